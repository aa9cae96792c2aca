"""Notices that a database file was deleted or replaced while it is open.

SQLite goes on with the file that it has open, whatever its name stands for by now: what it commits is on disk, and
lost with the process. So nothing may be acknowledged once the name no longer leads to the file.
"""

from pathlib import Path

from qflare_server.errors import StoreUnavailableError


class FileIdentity:
    """The file that a path led to when this was made.

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
        """Check that the path still leads to the file.

        Raises:
            StoreUnavailableError: The file was deleted or replaced.
        """
        if self._look() != self._identity:
            raise StoreUnavailableError(
                f"{self._path.name} was deleted or replaced while it was open: stop the coordinator"
                " and restore the file"
            )
