"""`python -m qflare_server`: the same as `qflare-server`."""

import sys

from qflare_server.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
