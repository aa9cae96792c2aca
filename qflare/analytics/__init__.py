"""Federated analytics: queries, the vectors by which devices answer them, and results from the sum of the answers."""
