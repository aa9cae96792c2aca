"""Model versions: initial model, download, release and rollback."""
