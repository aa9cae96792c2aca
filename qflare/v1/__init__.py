"""Generated protobuf and gRPC code of package qflare.v1; never edited by hand."""
