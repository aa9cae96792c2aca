"""The database: engine, tables, SQL statements, and the payload store."""
