"""Access: roles, tokens, authentication, login and rate limits."""
