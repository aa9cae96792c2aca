"""Devices: enrollment, keys and administration."""
