"""Updates: submission, upload and acceptance."""
