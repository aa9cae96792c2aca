"""Client of one bucket of an object store: S3, Google Cloud Storage or Azure, through obstore.

Only this module calls obstore. Its errors quote the store's answer, with key ids and signatures, so they are neither
chained nor shown: an error here names the HTTP status and the store's code alone.

obstore repeats a request with growing, random pauses after a server error, a throttled request, a broken connection or
a timeout. A write states a whole object, so repeating it is harmless.
"""

import configparser
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from qflare_server.config import ConfigError
from qflare_server.errors import (
    BucketMissingError,
    ObjectStoreDeniedError,
    ObjectStoreThrottledError,
    ObjectStoreUnavailableError,
    StorageFullError,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Credential

MAX_RETRIES: Final = 5
RETRY_FACTOR: Final = 3
"""A failed request is repeated for so many times the time of one attempt."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
CONNECT_S: Final = 5.0
PROBE_S: Final = 5.0
REREAD_S: Final = 10
"""Seconds after which a credentials file is read again."""
CLIENT_MARGIN_S: Final = 300
"""Seconds before their end at which obstore asks for new credentials."""
_STATUS: Final = re.compile(r"status code: (\d{3})\b")
_CODE: Final = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_NOT_FOUND: Final = 404
_OUT_OF_RANGE: Final = 416
_BUSY: Final = frozenset({429, 503})
_DENIED: Final = frozenset({401, 403})
_FULL: Final = frozenset({507})
_FULL_CODES: Final = frozenset(
    {"InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"}
)
_DENIED_CODES: Final = frozenset(
    {"AuthorizationHeaderMalformed", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
)
_S3_NAMES: Final = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_AZURE_NAMES: Final = (
    "azure_storage_account_name",
    "azure_storage_account_key",
    "azure_storage_sas_key",
    "azure_client_id",
    "azure_client_secret",
    "azure_tenant_id",
)
_Store = S3Store | GCSStore | AzureStore


@dataclass(frozen=True)
class BucketSettings:
    """Where a bucket is, and how to reach it.

    Attributes:
        url: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `az://CONTAINER/PREFIX`.
        endpoint: URL of the service; empty means the provider's own.
        region: Region of an S3 bucket; empty means that of the environment.
        timeout_s: Seconds for one attempt of a request; a failed request is repeated for three times as long.
        read_credentials: Reads the credentials file; None means the environment or the instance.
    """

    url: str
    endpoint: str
    region: str
    timeout_s: float
    read_credentials: Callable[[], bytes] | None


class ObjectInfo(NamedTuple):
    """Name and size in bytes of an object."""

    key: str
    size_bytes: int


class Bucket:
    """Objects under the prefix of a bucket; thread-safe.

    All methods raise ObjectStoreUnavailableError, or a subclass that says more, and StorageFullError.

    Args:
        settings: Where it is.

    Raises:
        ConfigError: The credentials file or another setting cannot be used.
    """

    def __init__(self, settings: BucketSettings) -> None:
        self._store = _connect(settings, settings.timeout_s, MAX_RETRIES)
        self._probe = _connect(settings, min(PROBE_S, settings.timeout_s), 0)

    def put(self, key: str, data: bytes) -> None:
        """Write an object; it is durable when this returns."""
        with _typed_errors():
            obstore.put(self._store, key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists; return whether it was written."""
        with _typed_errors():
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def get(self, key: str) -> bytes | None:
        """Return an object; None if there is none."""
        with _typed_errors():
            try:
                return obstore.get(self._store, key).bytes().to_bytes()
            except FileNotFoundError:
                pass
        self.require()
        return None

    def probe(self, key: str) -> bytes | None:
        """Return an object, in one attempt of `PROBE_S` seconds at most; None if there is none."""
        with _typed_errors():
            try:
                return obstore.get(self._probe, key).bytes().to_bytes()
            except FileNotFoundError:
                return None

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes of an object from `start` up to `end`: fewer if it ends before, none if it is missing."""
        with _typed_errors():
            try:
                return obstore.get_range(self._store, key, start=start, end=end).to_bytes()
            except FileNotFoundError:
                pass
            except BaseError as error:
                if _status_of(error) != _OUT_OF_RANGE:
                    raise
        return b""

    def collect(self, folder: str) -> Sequence[ObjectInfo]:
        """Return the objects below a folder, in the order of their names.

        Repeats the request once if the answer breaks off, which obstore does not.
        """
        try:
            return [*self.list(folder)]
        except ObjectStoreUnavailableError as error:
            if type(error) is not ObjectStoreUnavailableError:
                raise
        return [*self.list(folder)]

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Yield the objects below a folder, in the order of their names."""
        with _typed_errors():
            for batch in obstore.list(self._store, prefix=folder):
                for found in batch:
                    yield ObjectInfo(found["path"], found["size"])

    def require(self) -> None:
        """Check that the bucket exists.

        Raises:
            BucketMissingError: It does not.
        """
        with _typed_errors():
            next(iter(obstore.list(self._store, chunk_size=1)), None)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are gone are ignored."""
        if not keys:
            return
        with _typed_errors():
            try:
                obstore.delete(self._store, keys)
            except FileNotFoundError:
                missing = True
            else:
                missing = False
        if missing:
            self.require()
            for key in keys:  # where none is deleted with others, a missing one ends it
                self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        with _typed_errors():
            try:
                obstore.delete(self._store, key)
            except FileNotFoundError:
                return


@contextmanager
def _typed_errors() -> Iterator[None]:
    """Translate errors of obstore."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise _translate(error) from None


def _status_of(error: Exception) -> int:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def _translate(error: Exception) -> Exception:
    status = _status_of(error)
    found = _CODE.search(str(error))
    code = found[1] if found else ""
    what = f"{status} {code}".strip()
    if status in _FULL or code in _FULL_CODES:
        return StorageFullError()
    if status in _DENIED or code in _DENIED_CODES:
        return ObjectStoreDeniedError(f"the object store refuses the credentials: {what}")
    if status == _NOT_FOUND or isinstance(error, FileNotFoundError):
        return BucketMissingError("the bucket of the object store does not exist")
    if status in _BUSY:
        return ObjectStoreThrottledError(f"the object store is overloaded: {what}")
    if status:
        return ObjectStoreUnavailableError(f"the object store answered {what}")
    if "redirect" in str(error):
        return ObjectStoreUnavailableError(
            "the object store points elsewhere: check region and endpoint"
        )
    return ObjectStoreUnavailableError("the object store does not answer")


def _connect(settings: BucketSettings, timeout_s: float, max_retries: int) -> _Store:
    parts = urlsplit(settings.url)
    options: ClientConfig = {
        "allow_http": urlsplit(settings.endpoint).scheme == "http",
        "connect_timeout": timedelta(seconds=min(CONNECT_S, timeout_s)),
        "timeout": timedelta(seconds=timeout_s),
    }
    retries: RetryConfig = {
        "max_retries": max_retries,
        "retry_timeout": timedelta(seconds=RETRY_FACTOR * timeout_s),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_PAUSE_S),
            "max_backoff": timedelta(seconds=LONGEST_PAUSE_S),
            "base": 2,
        },
    }
    place: dict[str, Any] = {
        "prefix": parts.path.strip("/") or None,
        "client_options": options,
        "retry_config": retries,
    }
    make = {"s3": _connect_s3, "gs": _connect_gcs, "az": _connect_azure}[parts.scheme]
    try:
        return make(parts.netloc, settings, place)
    except (BaseError, ValueError, TypeError):  # quotes what it could not use
        problem = "QFLARE_OBJECT_STORE_URL: endpoint, region or credentials cannot be used"
    raise ConfigError(problem)


def _connect_s3(bucket: str, settings: BucketSettings, place: Mapping[str, Any]) -> _Store:
    named = {"endpoint": settings.endpoint, "region": settings.region}
    given: dict[str, Any] = {name: value for name, value in named.items() if value}
    if settings.read_credentials is None:
        return S3Store(bucket, **place, **given)
    provider = _FileCredentials(settings.read_credentials)
    provider()
    return S3Store(bucket, **place, **given, credential_provider=provider)


def _connect_gcs(bucket: str, settings: BucketSettings, place: Mapping[str, Any]) -> _Store:
    given: dict[str, Any] = {"base_url": settings.endpoint} if settings.endpoint else {}
    if settings.read_credentials is not None:
        given["service_account_key"] = settings.read_credentials().decode("utf-8", "replace")
    return GCSStore(bucket, **place, **given)


def _connect_azure(bucket: str, settings: BucketSettings, place: Mapping[str, Any]) -> _Store:
    given: dict[str, Any] = (
        {"azure_storage_endpoint": settings.endpoint} if settings.endpoint else {}
    )
    if settings.read_credentials is not None:
        given |= _credentials(settings.read_credentials(), _AZURE_NAMES)
    return AzureStore(bucket, **place, **given)


class _FileCredentials:
    """Credentials in a file, which is read again so that new ones need no restart."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read

    def __call__(self) -> "S3Credential":
        """Return the credentials; obstore asks for them again after `REREAD_S`."""
        found = _credentials(self._read(), _S3_NAMES)
        identifier, secret, token = (found.get(name, "") for name in _S3_NAMES)
        if not (identifier and secret):
            raise ConfigError(
                f"QFLARE_OBJECT_STORE_CREDENTIALS_FILE: want {_S3_NAMES[0]} and {_S3_NAMES[1]}"
            )
        return {
            "access_key_id": identifier,
            "secret_access_key": secret,
            "token": token or None,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CLIENT_MARGIN_S + REREAD_S),
        }


def _credentials(data: bytes, names: Sequence[str]) -> dict[str, str]:
    """Return the named values of the section `default` of a file.

    Raises:
        ConfigError: It is not such a file; the message quotes nothing of it.
    """
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(data.decode())
        values = dict(parser["default"])
    except (configparser.Error, UnicodeDecodeError, KeyError):
        values = {}
    if not values or set(values) - set(names):
        wanted = ", ".join(names)
        raise ConfigError(
            f"QFLARE_OBJECT_STORE_CREDENTIALS_FILE: want a section [default] with values of {wanted}"
        )
    return values
