"""Optional libraries of single commands, and the extra that installs each."""

import importlib
from typing import Any


class MissingExtraError(Exception):
    """A command requires a library that is not installed.

    Args:
        module: The library.
        extra: The extra of the distribution that installs it.
    """

    def __init__(self, module: str, extra: str) -> None:
        self.remedy = f"pip install 'qflare[{extra}]'"
        super().__init__(f"needs {module}: {self.remedy}")


def require(module: str, extra: str) -> Any:
    """Return a module of an extra.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(error.name or module, extra) from error
