"""Helpers for secure aggregation: their bundles in a folder, and calls to them.

The folder holds one JSON file per helper, a `HelperBundle`. A file that cannot be used is logged and ignored: its
helper is then unknown, and no task names it. Files are read again when the folder or one of them changes.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from qflare.addresses import is_loopback
from qflare.evidence.statements import StatementError
from qflare.evidence.unmasking import open_helper
from qflare.v1 import helper_service_pb2, security_pb2
from qflare_server.config import ServerConfig
from qflare_server.errors import HelperRefusedError, HelperUnavailableError

logger = logging.getLogger(__name__)

UNMASK: Final = "/qflare.v1.HelperService/Unmask"
MAX_BUNDLE_BYTES: Final = 2**20
MAX_MESSAGE_BYTES: Final = 4 * 2**20
MAX_TEXT: Final = 300
TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
    }
)
"""Statuses after which the same request may succeed."""

SignRequest = Callable[[bytes], security_pb2.SignedEnvelope]


@dataclass(frozen=True)
class _Known:
    """The readable bundles of the folder by helper id, and the state of the files that they were read from."""

    stamp: tuple[tuple[str, int], ...]
    bundles: Mapping[str, helper_service_pb2.HelperBundle]


class HelperFolder:
    """The helpers that a coordinator knows. Thread-safe.

    Args:
        config: Settings with the folder and the deadline of calls.
        sign_request: Signs requests with the task key.
    """

    def __init__(self, config: ServerConfig, sign_request: SignRequest) -> None:
        self.sign_request = sign_request
        self._config = config
        self._known = _Known((), {})
        self._channels: dict[bytes, grpc.Channel] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def documents(self) -> Mapping[str, security_pb2.SignedEnvelope]:
        """Return the signed documents by helper id."""
        return {name: bundle.document for name, bundle in self._bundles().items()}

    def unmask(
        self, helper_id: str, parts: Iterator[helper_service_pb2.UnmaskRequest]
    ) -> Iterator[helper_service_pb2.UnmaskResponse]:
        """Call a helper.

        The call is cancelled when the iteration ends, also before the last part.

        Raises:
            HelperUnavailableError: While iterating: it is unknown, cannot be reached or did not answer in time.
            HelperRefusedError: While iterating: it refused, or a part is malformed.
        """
        bundle = self._bundles().get(helper_id)
        if bundle is None:
            raise HelperUnavailableError(f"no bundle of helper {helper_id} in QFLARE_HELPER_DIR")
        # Without a deserializer: gRPC would log the traceback of a malformed part, and report it like a broken line.
        method: Any = self._channel(bundle).stream_stream(
            UNMASK, request_serializer=helper_service_pb2.UnmaskRequest.SerializeToString
        )
        call: Any = method(parts, timeout=self._config.helper_timeout_s)
        try:
            for data in call:
                yield helper_service_pb2.UnmaskResponse.FromString(data)
        except grpc.RpcError as error:
            raise _translated(helper_id, error) from error
        except DecodeError as error:
            raise HelperRefusedError(f"helper {helper_id}: its answer is malformed") from error
        finally:
            call.cancel()

    def close(self) -> None:
        """Cancel the calls; later ones fail."""
        with self._lock:
            self._is_closed = True
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def _channel(self, bundle: helper_service_pb2.HelperBundle) -> grpc.Channel:
        key = bundle.SerializeToString(deterministic=True)
        with self._lock:
            if self._is_closed:
                raise HelperUnavailableError("the coordinator is shutting down")
            if key not in self._channels:
                self._channels[key] = _open_channel(bundle)
            return self._channels[key]

    def _bundles(self) -> Mapping[str, helper_service_pb2.HelperBundle]:
        folder = self._config.helper_dir
        if folder is None:
            return {}
        try:
            paths = sorted(folder.glob("*.json"))
            stamp = tuple((str(path), path.stat().st_mtime_ns) for path in paths)
        except OSError as error:
            logger.warning("QFLARE_HELPER_DIR: %s", error)
            return {}
        if stamp != self._known.stamp:
            read = (self._read(path) for path in paths)
            self._known = _Known(stamp, dict(item for item in read if item is not None))
        return self._known.bundles

    def _read(self, path: Path) -> tuple[str, helper_service_pb2.HelperBundle] | None:
        """Return a helper with its bundle; None, with a warning, if the file cannot be used."""
        bundle = helper_service_pb2.HelperBundle()
        try:
            if path.stat().st_size > MAX_BUNDLE_BYTES:
                raise StatementError("file is too long")
            json_format.Parse(path.read_text("utf-8"), bundle)
            helper = open_helper(bundle.document, self._config.realm)
        except (OSError, ValueError, json_format.ParseError) as error:
            logger.warning("helper bundle %s ignored: %s", path, error)
            return None
        return helper.helper_id, bundle


def _open_channel(bundle: helper_service_pb2.HelperBundle) -> grpc.Channel:
    """Open a channel; plaintext only to this machine, and only without certificate authorities."""
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if is_loopback(bundle.address) and not bundle.certificate_authorities:
        return grpc.insecure_channel(bundle.address, options)
    authorities = bundle.certificate_authorities.encode() or None
    credentials = grpc.ssl_channel_credentials(root_certificates=authorities)
    return grpc.secure_channel(bundle.address, credentials, options)


def _translated(helper_id: str, error: grpc.RpcError) -> Exception:
    call: Any = error  # of a call, and so a `grpc.Call` too, which the stubs do not say
    code = call.code()
    details = call.details() or code.name
    text = f"helper {helper_id}: {details[:MAX_TEXT]}"
    return HelperUnavailableError(text) if code in TRANSIENT else HelperRefusedError(text)
