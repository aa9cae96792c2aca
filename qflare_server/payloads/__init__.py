"""Bytes of models and updates: received, sealed, read and written, in bounded memory."""
