"""Every SQL statement of the coordinator, one module per aggregate, as functions of a session.

Functions never open, commit or roll back a transaction. Those on the path of an update use the tables directly, without
mapped objects. Mapped objects that functions return are read-only.
"""
