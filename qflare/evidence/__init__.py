"""Signed statements, lineage, audit entries, checkpoints, and their verification."""
