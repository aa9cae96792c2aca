"""Aggregation: turns closed rounds into versions."""
