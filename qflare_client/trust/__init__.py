"""What a device trusts and verifies: keyset, audit head, evidence."""
