"""Last accepted version of each training session.

Released versions lag behind the latest ones, so they are tracked separately. The state is persistent, so that the
device detects a coordinator restored from an earlier backup.

It does not decide which versions may follow (see `qflare.evidence.lineage`).
"""

import threading

from google.protobuf.message import DecodeError

from qflare.evidence.lineage import ModelVersion
from qflare.v1 import security_pb2
from qflare_client.errors import KeyStoreError
from qflare_client.keystore.store import KeyStore

_DOCUMENT = "versions.json"


class AcceptedVersions:
    """Last accepted versions of every training session. Thread-safe.

    Args:
        store: Key store of the device.

    Raises:
        KeyStoreError: The stored versions are damaged.
    """

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        try:
            self._versions = {
                track: ModelVersion(
                    security_pb2.ModelStatement.FromString(bytes.fromhex(entry["statement"])),
                    str(entry["digest"]),
                )
                for track, entry in store.read_document(_DOCUMENT).items()
            }
        except (KeyError, TypeError, ValueError, DecodeError) as error:
            raise KeyStoreError(f"{store.home / _DOCUMENT} is damaged: {error!r}") from error

    def last(self, training_session_id: str, *, released: bool = False) -> ModelVersion | None:
        """Return the last accepted version; None if there is none."""
        return self._versions.get(_track(training_session_id, released=released))

    def accept(self, version: ModelVersion, *, released: bool = False) -> None:
        """Store a version durably, unless it is not newer than the last one.

        Raises:
            KeyStoreError: It cannot be written.
        """
        track = _track(version.statement.training_session_id, released=released)
        with self._lock:
            last = self._versions.get(track)
            if last is not None and last.statement.version >= version.statement.version:
                return
            self._versions[track] = version
            self._store.write_document(
                _DOCUMENT, {name: _entry(entry) for name, entry in self._versions.items()}
            )


def _entry(version: ModelVersion) -> dict[str, str]:
    return {"statement": version.statement.SerializeToString().hex(), "digest": version.digest}


def _track(training_session_id: str, *, released: bool) -> str:
    return f"{training_session_id}/released" if released else training_session_id
