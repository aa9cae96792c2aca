"""Arithmetic of secure aggregation: quantization to a ring, masks from seeds, and seeds sealed to a helper."""
