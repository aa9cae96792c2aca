"""Tests with libraries that only `make test-frameworks` installs: collected with `-m frameworks` alone."""

from pathlib import Path

import pytest

from tests.integration.flower.conftest import new_app, start

__all__ = ["new_app", "start"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out of every other run, which lacks the libraries."""
    named = collection_path.name.startswith("test_")
    return True if named and config.getoption("markexpr") != "frameworks" else None
