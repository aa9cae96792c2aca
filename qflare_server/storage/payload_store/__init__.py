"""Payload stores: the chunks of large payloads, apart from the rows that refer to them."""

from qflare_server.storage.payload_store.catalog import StoreCatalog
from qflare_server.storage.payload_store.database import PayloadFile, PayloadTable
from qflare_server.storage.payload_store.files import MARKER, PayloadFolder
from qflare_server.storage.payload_store.interface import (
    DATABASE,
    FILES,
    OBJECT,
    READ_CHUNKS,
    STORE_NAMES,
    PayloadStore,
)

__all__ = [
    "DATABASE",
    "FILES",
    "MARKER",
    "OBJECT",
    "READ_CHUNKS",
    "STORE_NAMES",
    "PayloadFile",
    "PayloadFolder",
    "PayloadStore",
    "PayloadTable",
    "StoreCatalog",
]
