"""Trust and verification on the device: keyset, audit head, evidence."""
