"""Roles, tokens, authentication, login and rate limits."""
