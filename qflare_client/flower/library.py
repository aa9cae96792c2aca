"""The library flwr, imported at the first use."""

import importlib
from typing import Any

from qflare_client.errors import QflareClientError


class MissingFlowerError(QflareClientError):
    """The library flwr is not installed, or is too old."""

    remedy = "pip install 'qflare[flower]'"


def flower() -> Any:
    """Return the module `flwr.app`.

    Raises:
        MissingFlowerError: It is not installed.
    """
    return _module("flwr.app")


def client_app_class() -> Any:
    """Return the class `ClientApp`.

    Raises:
        MissingFlowerError: It is not installed.
    """
    return _module("flwr.clientapp").ClientApp


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not name.startswith(error.name):
            raise
        raise MissingFlowerError(f"a Flower app needs the library flwr ({name})") from error
