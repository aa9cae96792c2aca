"""The whole way of a new user, from the first start to the audit, in folders of every legal name."""

import os
import socket
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qflare.tensors import Array
from qflare_client import Client, run
from qflare_client.__main__ import main as client_main
from qflare_client.admin.__main__ import main as admin_main
from qflare_server.cli.main import main as server_main
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.serving.coordinator import Coordinator

FOLDERS = {
    "space": "my data",
    "unicode": "dätä-数据",
    "percent": "a%20b%2Fc%",
    "url": "a#b=d&e@f:1",
    "newline": "a\nb",
    "quotes": "a'b\"c`$(x)",
    "bytes": os.fsdecode(b"a\xff\xfeb"),
    "backslash": "a\\b",
    "dash": "-a",
    "dots": "...",
}


def add_one(arrays: dict[str, Array], _: object) -> tuple[dict[str, Array], int, dict[str, float]]:
    """Train."""
    return {name: array + 1 for name, array in arrays.items()}, 1, {}


def walk(
    capsys: pytest.CaptureFixture[str], here: Path, data: str, listen: str = "127.0.0.1:0"
) -> None:
    """Go the whole way with the data folder `data` and everything else beside it."""
    server = [f"--data-dir={data}"]
    save_file({"w": np.zeros(4, np.float32)}, here / "initial.safetensors")
    assert server_main([*server, "init"]) == 0
    config = ServerConfig.from_env({"QFLARE_DATA_DIR": data, "QFLARE_LISTEN": listen}).checked()
    assert config.data_dir == Path(data)
    coordinator = Coordinator(config)
    coordinator.start()
    try:
        address = coordinator.address
        create = ["session", "create", "--name", "m", "--rounds", "1", "--quorum", "1", "--start"]
        capsys.readouterr()
        assert server_main([*server, *create, f"--model={here / 'initial.safetensors'}"]) == 0
        session_id = capsys.readouterr().out.split()[0]
        issue = ["token", "issue", "--count", "1", f"--bundles={here / 'bundles'}"]
        assert server_main([*server, *issue, "--address", address]) == 0
        (bundle,) = (here / "bundles").iterdir()
        home = here / "device"
        assert client_main(["enroll", str(bundle), f"--home={home}"]) == 0
        with Client(home=home) as client:
            summary = run(client, add_one, training_session_id=session_id, patience_s=20.0)
        assert summary.update_count == 1
        assert client_main(["status", f"--home={home}"]) == 0
        final = here / "final.safetensors"
        assert server_main([*server, "model", "export", session_id, str(final)]) == 0
        np.testing.assert_array_equal(load_file(final)["w"], np.ones(4, np.float32))
        admin = ["--address", address, f"--token-file={Path(data) / 'admin.token'}"]
        assert admin_main([*admin, "session", "list"]) == 0
    finally:
        coordinator.stop(0.5)
    assert server_main([*server, "audit", "verify"]) == 0


SOCKETS = {
    "relative": "unix:socket",
    "dot": "unix:./socket",
    "space": "unix:a b",
    "percent": "unix:a%20b%25",
    "unicode": "unix:dätä-数据",
    "abstract": "unix-abstract:qflare-test",
}
"""Listening addresses, relative to the working directory."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory of a test, which has no settings of its own."""
    for name in [name for name in os.environ if name.startswith("QFLARE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are Unicode there")
@pytest.mark.parametrize("name", FOLDERS.values(), ids=FOLDERS.keys())
def test_folders(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Relative, and with everything in a folder of such a name."""
    (here / name).mkdir()
    os.chdir(here / name)

    walk(capsys, here / name, name)


def test_a_symbolic_link(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "real").mkdir(mode=0o700)
    (here / "link").symlink_to("real")

    walk(capsys, here, "link")


def test_a_question_mark_in_the_data_folder_is_refused_with_the_reason(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server_main([f"--data-dir={here / 'a?b'}", "init"]) != 0
    assert "question mark" in capsys.readouterr().err


@pytest.mark.parametrize("listen", SOCKETS.values(), ids=SOCKETS.keys())
def test_unix_sockets(here: Path, capsys: pytest.CaptureFixture[str], listen: str) -> None:
    walk(capsys, here, "data", listen)


@pytest.mark.parametrize("prefix", ["unix:", "unix://"])
def test_unix_sockets_with_an_absolute_path(
    capsys: pytest.CaptureFixture[str], here: Path, prefix: str
) -> None:
    with TemporaryDirectory() as short:
        walk(capsys, here, "data", f"{prefix}{short}/socket")


def coordinator_on(listen: str) -> Coordinator:
    return Coordinator(
        ServerConfig.from_env({"QFLARE_DATA_DIR": "data", "QFLARE_LISTEN": listen}).checked()
    )


@pytest.mark.usefixtures("here")
def test_a_socket_that_a_killed_coordinator_left_is_replaced() -> None:
    assert server_main(["--data-dir=data", "init"]) == 0
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind("socket")
        killed.listen()

    coordinator = coordinator_on("unix:socket")
    coordinator.start()
    try:
        assert server_main(["health", "--address=unix:socket"]) == 0
    finally:
        coordinator.stop(0)


def test_a_socket_in_use_is_left_to_its_program(here: Path) -> None:
    assert server_main(["--data-dir=data", "init"]) == 0
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("socket")
        other.listen()

        with pytest.raises(ConfigError, match="another program listens there"):
            coordinator_on("unix:socket")

        assert (here / "socket").is_socket()


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        ("unix:" + "a" * 200, "200 bytes, want at most 107"),
        ("unix:file", "a file that is no socket is in the way"),
        ("unix:none/socket", "its folder is missing"),
        ("unix:", "want a path"),
    ],
)
def test_sockets_that_cannot_be_are_refused_with_the_reason(
    here: Path, listen: str, reason: str
) -> None:
    assert server_main(["--data-dir=data", "init"]) == 0
    (here / "file").touch()

    with pytest.raises(ConfigError, match=reason):
        coordinator_on(listen)


@pytest.mark.parametrize(
    "host",
    [
        "LOCALHOST",
        "a_b.localhost",
        "a-b.localhost",
        "xn--bcher-kva.localhost",
        "bücher.localhost",
        "1.localhost",
        "dns:///localhost",
        "ipv4:127.0.0.1",
    ],
)
def test_host_names_of_every_legal_form(here: Path, host: str) -> None:
    """Names below localhost are the machine itself everywhere (RFC 6761, section 6.3)."""
    assert server_main(["--data-dir=data", "init"]) == 0
    coordinator = coordinator_on("127.0.0.1:0")
    coordinator.start()
    try:
        address = f"{host}:{coordinator.address.rpartition(':')[2]}"
        plain = [] if host in {"LOCALHOST", "ipv4:127.0.0.1"} else ["--insecure"]
        assert server_main(["health", f"--address={address}"]) == 0
        admin = ["--address", address, f"--token-file={here / 'data' / 'admin.token'}", *plain]
        assert admin_main([*admin, "session", "list"]) == 0
        issue = ["token", "issue", "--bundles=bundles", "--address", address]
        assert server_main(["--data-dir=data", *issue]) == 0
        (bundle,) = (here / "bundles").iterdir()
        assert client_main(["enroll", str(bundle), "--home=device", *plain]) == 0
    finally:
        coordinator.stop(0)
