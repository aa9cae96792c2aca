"""Device enrollment, keys and administration."""
