"""The QFLARE contract: schemas, generated stubs, and the meaning of the bytes.

Imported by the coordinator and by the device SDK alike; imports neither.
"""

import os
import sys

if sys.platform == "win32":
    raise ImportError(
        "QFLARE does not run on Windows: its key files rely on POSIX permissions and locks."
        " Use Linux, macOS, a container, or WSL 2."
    )

# gRPC's core writes what a peer sends to standard error as it is, escape sequences included. It reads this once, when
# it is imported; errors reach the program all the same. Set the variable to see more.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__version__ = "0.1.0"
