"""One running process: gRPC server, dashboard, metrics, background threads, start and stop."""
