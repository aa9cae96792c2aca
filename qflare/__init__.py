"""The QFLARE contract: schemas, generated stubs, and the meaning of the bytes.

Imported by the coordinator and by the device SDK alike; imports neither.
"""

__version__ = "0.1.0"
