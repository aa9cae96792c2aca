"""Detects that a database file was deleted or replaced while it is open.

SQLite keeps writing to the file that it has open, whatever its path refers to by now; commits to a deleted file are
lost when the process ends. So nothing may be acknowledged once the path no longer refers to the open file.
"""

from pathlib import Path

from qflare_server.errors import StoreUnavailableError


class FileIdentity:
    """Identity of the file that a path referred to when this object was created.

    Args:
        path: An existing file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = self._look()

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def require(self) -> None:
        """Check that the path still refers to the same file.

        Raises:
            StoreUnavailableError: The file was deleted or replaced.
        """
        if self._look() != self._identity:
            raise StoreUnavailableError(
                f"{self._path.name} was deleted or replaced while it was open: stop the coordinator"
                " and restore the file"
            )
