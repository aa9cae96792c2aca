"""The server process: gRPC server, dashboard, metrics, background threads, startup and shutdown."""
