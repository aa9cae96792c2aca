"""Registry and aggregation for programs that embed the coordinator."""
