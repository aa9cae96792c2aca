"""What virtual devices keep between rounds: local tensors, control variates, and residuals of top-k updates.

A device's files are those of the device SDK, without a key store: what is staged with an update takes effect when the
coordinator has accepted it, and is dropped otherwise.
"""

from pathlib import Path
from typing import Final

from qflare_client.models.error_feedback import ErrorFeedback
from qflare_client.models.local_tensors import LocalTensors

ACCEPTED: Final = "accepted"
"""File with the id of the last accepted update of a device."""


class DeviceFolder:
    """The files of one virtual device.

    Args:
        folder: Created when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read_secret(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write_secret(self, name: str, secret: bytes) -> None:
        """Write a file."""
        self._folder.mkdir(exist_ok=True)
        (self._folder / name).write_bytes(secret)

    def rename(self, name: str, following: str) -> None:
        """Give a file another name, replacing a file of that name."""
        (self._folder / name).replace(self._folder / following)

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        (self._folder / name).unlink(missing_ok=True)


class DeviceMemory:
    """What one device keeps between rounds.

    Args:
        home: Folder of all devices.
        index: Of the device.

    Attributes:
        local: Its local tensors.
        feedback: Its residuals of top-k updates.
    """

    def __init__(self, home: Path, index: int) -> None:
        self._files = DeviceFolder(home / str(index))
        self.local = LocalTensors(self._files, (), self._is_accepted)
        self.feedback = ErrorFeedback(self._files, self._is_accepted)

    def accept(self, update_id: str) -> None:
        """Note that the coordinator has accepted an update."""
        self._files.write_secret(ACCEPTED, update_id.encode())

    def _is_accepted(self, update_id: str) -> bool:
        return self._files.read_secret(ACCEPTED) == update_id.encode()
