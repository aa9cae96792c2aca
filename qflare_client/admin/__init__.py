"""The `qflare-admin` command: administration of a remote coordinator.

Everything goes through `AdminService`; nothing here reads a database. Modules hold one topic of commands each; each
has `add(commands)`, which adds its parsers, and functions that run them.
"""
