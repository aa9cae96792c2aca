"""Rules of a training session that run inside a caller's transaction: configuration, rounds, versions."""
