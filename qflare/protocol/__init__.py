"""Exchanges between a device and the coordinator: enrollment, login, proof of possession, keysets."""
