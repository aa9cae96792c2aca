"""Symbol resolution for server reflection."""

from typing import Any

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool


class MethodPool:
    """A descriptor pool that also resolves method names, which reflection clients request.

    protobuf's pool resolves only services, messages and fields, so `grpcurl describe` of a method and ghz without
    protos fail with it.
    """

    def __init__(self, pool: DescriptorPool) -> None:
        self._pool = pool

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 - protobuf's name
        """Return the file that declares a symbol, including methods.

        Raises:
            KeyError: There is no such symbol.
        """
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            if method not in found.methods_by_name:
                raise
            return found.file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)
