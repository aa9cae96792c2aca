"""What virtual devices keep between rounds: local tensors, control variates, and residuals of top-k updates.

A device's files are those of the device SDK, without a key store: what is staged with an update takes effect when the
coordinator has accepted it, and is dropped otherwise. They are in a folder of this machine; the files of single devices
can be shipped to another machine for a training, and back.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from qflare_client.models.error_feedback import ErrorFeedback
from qflare_client.models.local_tensors import LocalTensors
from qflare_client.models.staged_arrays import SecretFiles

ACCEPTED: Final = "accepted"
"""File with the id of the last accepted update of a device."""


Shipment: TypeAlias = dict[int, dict[str, bytes]]
"""Content of files by name, of devices by index."""


class Home(Protocol):
    """Where the files of all devices are."""

    def files(self, index: int) -> SecretFiles:
        """Return the files of a device."""


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


class HomeFolder:
    """The files of all devices in a folder of this machine.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self, index: int) -> DeviceFolder:
        """Return the files of a device."""
        return DeviceFolder(self._folder / str(index))

    def pack(self, devices: Iterable[int]) -> Shipment:
        """Return the files of devices, to be used elsewhere."""
        return {index: self._content(index) for index in devices}

    def _content(self, index: int) -> dict[str, bytes]:
        folder = self._folder / str(index)
        if not folder.is_dir():
            return {}
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def unpack(self, shipment: Shipment) -> None:
        """Replace the files of devices by those that came back."""
        for index, content in shipment.items():
            files, known = self.files(index), self._content(index)
            for name in known.keys() - content.keys():
                files.delete(name)
            for name, data in content.items():
                if known.get(name) != data:
                    files.write_secret(name, data)


class ShippedFiles:
    """The files of one virtual device, away from its folder.

    Args:
        content: Changed in place.
    """

    def __init__(self, content: dict[str, bytes]) -> None:
        self._content = content

    def read_secret(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        return self._content.get(name)

    def write_secret(self, name: str, secret: bytes) -> None:
        """Write a file."""
        self._content[name] = bytes(secret)

    def rename(self, name: str, following: str) -> None:
        """Give a file another name, replacing a file of that name."""
        self._content[following] = self._content.pop(name)

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        self._content.pop(name, None)


class ShippedHome:
    """The files of some devices, away from their folder.

    Args:
        shipment: As packed; it is not changed.

    Attributes:
        shipment: The files as they are now.
    """

    def __init__(self, shipment: Mapping[int, Mapping[str, bytes]]) -> None:
        self.shipment: Shipment = {index: dict(content) for index, content in shipment.items()}

    def files(self, index: int) -> ShippedFiles:
        """Return the files of a device."""
        return ShippedFiles(self.shipment[index])


class DeviceMemory:
    """What one device keeps between rounds.

    Args:
        home: Where the files of all devices are.
        index: Of the device.

    Attributes:
        local: Its local tensors.
        feedback: Its residuals of top-k updates.
    """

    def __init__(self, home: Home, index: int) -> None:
        self._files = home.files(index)
        self.local = LocalTensors(self._files, (), self._is_accepted)
        self.feedback = ErrorFeedback(self._files, self._is_accepted)

    def accept(self, update_id: str) -> None:
        """Note that the coordinator has accepted an update."""
        self._files.write_secret(ACCEPTED, update_id.encode())

    def _is_accepted(self, update_id: str) -> bool:
        return self._files.read_secret(ACCEPTED) == update_id.encode()
