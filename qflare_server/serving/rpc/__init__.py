"""The RPC methods: each decodes its request, calls one use case and encodes the answer."""
