"""The pages, one module a section: each builds from the use cases what its template shows."""
