"""The coordinator's own keys and trust documents.

`ensure_initialized` (or `setup.initialize`) creates a key folder, `ServerKeys.load` loads it for serving, and the
functions of `rotation` rotate keys.
"""

from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.secret_files import KeyStoreError
from qflare_server.keys.server_keys import ServerKeys
from qflare_server.keys.setup import SetupOptions, ensure_initialized

__all__ = [
    "KeyFolder",
    "KeyStoreError",
    "ServerKeys",
    "SetupOptions",
    "ensure_initialized",
]
