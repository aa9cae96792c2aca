"""Conversion between protobuf messages and values of the use cases."""
