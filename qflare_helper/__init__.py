"""The helper for secure aggregation: it knows the seeds of masks, and gives coordinators nothing but sums of masks."""
