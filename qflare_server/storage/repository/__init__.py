"""Every SQL statement of the coordinator, one module per aggregate, as functions of a session.

Functions never open, commit or roll back a transaction. Those on the path of an update speak to the tables
directly; none returns a mapped object that is meant to be changed.
"""
