"""The `qflare-server` command: parsers, output and exit codes."""
