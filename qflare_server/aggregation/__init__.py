"""Aggregation of closed rounds into versions: the worker thread, the pass, the fold, the publication."""
