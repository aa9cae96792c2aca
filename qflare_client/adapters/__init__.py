"""Adapters between machine-learning libraries and the SDK's arrays; each imports its library lazily."""
