"""An object store for tests: moto's S3 server, or the one at the endpoint in `QFLARE_TEST_S3_URL`.

`QFLARE_TEST_OBJECT_STORE_URL` names a bucket of another provider, such as `gs://BUCKET` or `az://CONTAINER`, for the
contract suite; `..._ENDPOINT` and `..._CREDENTIALS_FILE` beside it hold what the settings of those names hold.

moto is in an environment of its own, because its dependencies conflict with ours: `make .venv-moto/.installed` makes
it, and `QFLARE_TEST_MOTO_PYTHON` names the interpreter of another one.
"""

import os
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import obstore
from obstore.store import S3Store

ROOT: Final = Path(__file__).parents[2]
PYTHON: Final = Path(os.environ.get("QFLARE_TEST_MOTO_PYTHON", ROOT / ".venv-moto/bin/python"))
BUCKET: Final = "qflare-tests"
KEY_ID: Final = os.environ.get("AWS_ACCESS_KEY_ID", "AKIATESTKEYIDENTIFIER")
SECRET: Final = os.environ.get("AWS_SECRET_ACCESS_KEY", "test-secret-access-key")
GIVEN_ENDPOINT: Final = os.environ.get("QFLARE_TEST_S3_URL", "")
GIVEN_URL: Final = os.environ.get("QFLARE_TEST_OBJECT_STORE_URL", "").rstrip("/")
STOP_S: Final = 30
_SCOPE: Final = "us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
_RUNNING: Final = re.compile(rb"Running on (http://\S+)")


@contextmanager
def moto_server() -> Iterator[str]:
    """Yield the URL of an S3 server that has an empty bucket."""
    command = [str(PYTHON), "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        said = process.stderr
        found = next(filter(None, map(_RUNNING.search, said)), None)
        reader = threading.Thread(target=said.read, daemon=True)
        reader.start()
        try:
            assert found is not None, "moto's server did not start"
            url = found[1].decode()
            request(f"{url}/{BUCKET}", "PUT")
            yield url
        finally:
            process.terminate()
            reader.join(STOP_S)


def request(url: str, method: str) -> None:
    """Send a request to moto's server, which does not verify signatures."""
    headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY_ID}/20300101/{_SCOPE}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method)):
        pass


def delete_object(settings: dict[str, Any], key: str) -> None:
    """Delete an object below the place that the settings of a coordinator name."""
    bucket, prefix = settings["object_store_url"].removeprefix("s3://").split("/", 1)
    store = S3Store(
        bucket,
        prefix=prefix,
        endpoint=settings["object_store_endpoint"],
        region=settings["object_store_region"],
        access_key_id=KEY_ID,
        secret_access_key=SECRET,
        client_options={"allow_http": True},
    )
    obstore.delete(store, key)


def credentials_file(folder: Path, *, secret: str = SECRET) -> Path:
    """Write a file with credentials; return its path."""
    path = folder / "object-store-credentials"
    path.touch(mode=0o600)
    path.write_text(f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {secret}\n")
    return path


def bucket_settings(endpoint: str, url: str, folder: Path) -> dict[str, Any]:
    """Return the settings of a coordinator that puts new payloads into a bucket."""
    return {
        "payload_store": "object",
        "object_store_url": url,
        "object_store_endpoint": endpoint,
        "object_store_region": os.environ.get("AWS_REGION", "us-east-1"),
        "object_store_credentials_file": credentials_file(folder),
    }


def given_settings(place: str, folder: Path) -> dict[str, Any]:
    """Return the settings of a coordinator that puts new payloads into the bucket at `GIVEN_URL`."""
    path = folder / "object-store-credentials"
    path.touch(mode=0o600)
    path.write_bytes(Path(os.environ["QFLARE_TEST_OBJECT_STORE_CREDENTIALS_FILE"]).read_bytes())
    return {
        "payload_store": "object",
        "object_store_url": f"{GIVEN_URL}/{place}",
        "object_store_endpoint": os.environ.get("QFLARE_TEST_OBJECT_STORE_ENDPOINT", ""),
        "object_store_credentials_file": path,
    }
