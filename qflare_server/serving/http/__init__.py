"""HTTP servers of the dashboard and the metrics: threads, TLS, bounded connections, known host names."""
