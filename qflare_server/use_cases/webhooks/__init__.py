"""Webhooks: signed HTTP messages on events of the audit log, at least once and in order."""
