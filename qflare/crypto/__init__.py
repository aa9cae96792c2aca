"""Cryptography: signatures, sealing, hashing, envelopes and Merkle trees."""
