"""Models and updates on the device: download, upload, lineage."""
