"""The QFLARE coordinator: enrolls devices, takes signed updates in, publishes versions of global models."""
