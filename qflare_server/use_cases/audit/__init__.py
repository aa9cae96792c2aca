"""The audit log: entries, proofs, evidence, sequencing and witnesses."""
