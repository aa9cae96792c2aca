"""gRPC calls of the SDK: transport, retries, tracing."""
