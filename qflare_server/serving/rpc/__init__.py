"""gRPC services: each method decodes its request, calls one use case and encodes the response."""
