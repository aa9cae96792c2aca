"""The subcommands of `qflare-server`, one module per topic; each adds its parsers and runs them."""
