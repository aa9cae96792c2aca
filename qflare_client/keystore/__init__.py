"""The key store of a device."""
