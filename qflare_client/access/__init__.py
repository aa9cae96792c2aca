"""Enrollment, login and key rotation of a device."""
