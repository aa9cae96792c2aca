"""The QFLARE contract: schemas, generated stubs, and the meaning of the bytes.

Imported by the coordinator and by the device SDK alike; imports neither.
"""

import sys

if sys.platform == "win32":
    raise ImportError(
        "QFLARE does not run on Windows: its key files rely on POSIX permissions and locks."
        " Use Linux, macOS, a container, or WSL 2."
    )

__version__ = "0.1.0"
