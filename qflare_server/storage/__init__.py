"""Storage: database, tables, statements and payload store."""
