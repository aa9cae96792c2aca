"""Training sessions: administration, progress, tasks and events."""
