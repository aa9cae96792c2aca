"""Rules of a training session, run inside a caller's transaction: configuration, rounds, versions."""
