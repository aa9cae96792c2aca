"""Exchanges between a device and the coordinator: handshake, enrollment, login, proof of possession, keysets."""
