"""The `qflare-admin` command: administration of a remote coordinator.

All commands call `AdminService`; none reads a database. Each module implements the commands of one topic:
`add(commands)` adds their parsers, and one function runs each command.
"""
