"""Signatures, sealing, hashing, envelopes and Merkle trees."""
