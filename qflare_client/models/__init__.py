"""Model download, update upload and lineage on the device."""
