"""Serving: one running process with its gRPC server, dashboard, metrics and background threads."""
