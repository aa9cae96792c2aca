"""Payloads: bytes of models and updates, received, sealed, read and written within bounds."""
