"""The wheel and the source distribution hold what they must, and work in environments of their own."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QFLARE_")}
    clean.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from the tracked files alone, so that nothing else can slip in or be needed."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, source, cwd=source)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def install(folder: Path, requirement: str, *options: str) -> Path:
    """Make an environment with nothing but a requirement; return its folder of programs."""
    venv.create(folder, with_pip=True)
    constraints = ROOT / ".ci" / "constraints.txt"
    binaries = folder / "bin"
    pip: list[str | Path] = [binaries / "pip", "install", "--quiet", *options]
    run(*pip, "-c", constraints, requirement, cwd=folder)
    return binaries


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("device"), str(wheel))


@pytest.fixture(scope="module")
def server(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("server"), f"{wheel}[server]")


def test_the_wheel_holds_every_tracked_file_of_the_packages_and_no_other(wheel: Path) -> None:
    places = {"protos": "qflare/protos", "migrations": "qflare_server/migrations"}
    places |= {
        name: name
        for name in (
            "qflare",
            "qflare_client",
            "qflare_helper",
            "qflare_server",
            "qflare_simulation",
        )
    }
    wanted = {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for source, target in places.items()
        for path in tracked_files()
        if path.is_relative_to(ROOT / source)
    }

    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert found == wanted


def test_the_wheel_carries_its_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()

    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in text


def test_the_source_distribution_builds_the_same_wheel(
    dist: Path, tmp_path: Path, wheel: Path
) -> None:
    (path,) = dist.glob("*.tar.gz")

    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--wheel-dir",
        tmp_path,
        path,
        cwd=tmp_path,
    )

    (rebuilt,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_a_device_gets_neither_the_coordinator_s_libraries_nor_needs_them(
    device: Path, tmp_path: Path
) -> None:
    found = run(
        device / "python",
        "-W",
        "error",
        "-c",
        "import importlib.util, qflare_client; print(importlib.util.find_spec('sqlalchemy'))",
        cwd=tmp_path,
    )

    assert found == "None\n"


def test_the_device_s_command_explains_itself(device: Path, tmp_path: Path) -> None:
    assert "usage" in run(device / "qflare-client", "--help", cwd=tmp_path).lower()


def test_the_administrator_s_command_explains_itself(device: Path, tmp_path: Path) -> None:
    assert "usage" in run(device / "qflare-admin", "--help", cwd=tmp_path).lower()


def test_the_coordinator_s_command_explains_itself(server: Path, tmp_path: Path) -> None:
    assert "usage" in run(server / "qflare-server", "--help", cwd=tmp_path).lower()


def test_the_coordinator_migrates_with_the_migrations_in_the_wheel(
    server: Path, tmp_path: Path
) -> None:
    environment = {"QFLARE_DATA_DIR": str(tmp_path / "data")}

    run(server / "qflare-server", "migrate", cwd=tmp_path, **environment)

    revision = run(
        server / "python",
        "-c",
        "import sqlite3, sys;"
        "print(*sqlite3.connect(sys.argv[1]).execute('SELECT version_num FROM alembic_version'))",
        tmp_path / "data" / "qflare.db",
        cwd=tmp_path,
    )
    newest = max(ROOT.glob("migrations/versions/rev_*.py")).name.split("_")[1]
    assert newest in revision


DEVICE_PROGRAM = """
import sys
from pathlib import Path
from qflare_client import Client, enroll, run

def train(arrays, config):
    return {name: values + 1 for name, values in arrays.items()}, 10, {"loss": 1.0}

enroll(Path(sys.argv[1]), home=Path("home"))
with Client(home=Path("home")) as client:
    print(run(client, train, training_session_id=sys.argv[2]).update_count)
"""

MODEL_PROGRAM = """
import numpy, safetensors.numpy, sys
if len(sys.argv) == 2:
    safetensors.numpy.save_file({"w": numpy.zeros(3, numpy.float32)}, sys.argv[1])
else:
    print(safetensors.numpy.load_file(sys.argv[1])["w"].tolist())
"""


def test_the_installed_wheels_run_a_job(server: Path, device: Path, tmp_path: Path) -> None:
    command = [str(server / "qflare-server"), "--data-dir", str(tmp_path / "data")]
    run(server / "python", "-c", MODEL_PROGRAM, "initial.safetensors", cwd=tmp_path)
    with subprocess.Popen(
        [*command, "serve", "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        text=True,
    ) as coordinator:
        try:
            assert coordinator.stdout is not None
            address = next(
                line.split()[-1] for line in coordinator.stdout if line.startswith("serving on ")
            )
            create = [*command, "session", "create", "--name", "wheel", "--rounds", "2"]
            create += ["--quorum", "1"]
            session_id = run(
                *create, "--model", "initial.safetensors", "--start", cwd=tmp_path
            ).strip()
            run(
                *(*command, "token", "issue", "--bundles", "bundles", "--address", address),
                cwd=tmp_path,
            )
            (bundle,) = (tmp_path / "bundles").glob("*.json")
            made = run(device / "python", "-c", DEVICE_PROGRAM, bundle, session_id, cwd=tmp_path)
            run(*command, "model", "export", session_id, "final.safetensors", cwd=tmp_path)
            token_file = tmp_path / "data" / "admin.token"
            listed = run(
                *(device / "qflare-admin", "--address", address, "--token-file", token_file),
                *("session", "list", "--json"),
                cwd=tmp_path,
            )
        finally:
            coordinator.terminate()

    weights = run(server / "python", "-c", MODEL_PROGRAM, "final.safetensors", "show", cwd=tmp_path)
    assert (made.strip(), weights.strip()) == ("2", "[2.0, 2.0, 2.0]")
    assert "TRAINING_SESSION_STATE_COMPLETED" in listed


@pytest.mark.parametrize(
    "words",
    [[], ["serve"], ["health"], ["session", "create", "--name", "x", "--quorum", "1"], ["fly"]],
)
def test_on_a_device_the_coordinator_s_command_says_what_to_install(
    device: Path, words: list[str]
) -> None:
    done = subprocess.run(
        [str(device / "qflare-server"), *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    *_, cause, remedy = done.stderr.splitlines()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert cause.startswith("qflare-server: ")
    assert cause.endswith(" is not installed")
    assert remedy == "try: pip install 'qflare[server]'"


def test_without_its_extra_the_dashboard_is_a_refusal_with_the_command(
    server: Path, tmp_path: Path
) -> None:
    command = [server / "qflare-server", "--data-dir", tmp_path / "data", "serve"]

    done = subprocess.run(
        [*map(str, command), "--listen", "127.0.0.1:0", "--dashboard", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert done.returncode == 1
    assert "QFLARE_DASHBOARD: pip install 'qflare[dashboard]'" in done.stderr


def test_the_installed_wheel_serves_the_dashboard(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    binaries = install(tmp_path_factory.mktemp("dashboard"), f"{wheel}[server,dashboard]")
    command = [binaries / "qflare-server", "--data-dir", tmp_path / "data", "serve"]
    with subprocess.Popen(
        [*map(str, command), "--listen", "127.0.0.1:0", "--dashboard", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        text=True,
    ) as coordinator:
        try:
            assert coordinator.stdout is not None
            url = next(
                line.split()[-1] for line in coordinator.stdout if line.startswith("dashboard on ")
            )
            texts = [
                urlopen(url + path, timeout=TIMEOUT_S).read().decode()
                for path in (
                    *("login", "static/dashboard.css"),
                    *("static/dashboard.js", "static/keyboard.js"),
                )
            ]
        finally:
            coordinator.terminate()

    assert "Admin token" in texts[0]
    assert all(texts)


def test_three_commands_lead_from_the_wheel_to_a_simulated_result(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    # Compiling all of pandas and scikit-learn would take longer than the rest of the test.
    folder = tmp_path_factory.mktemp("simulation")
    binaries = install(folder, f"{wheel}[simulation]", "--no-compile")
    said = run(binaries / "qflare-simulate", "init", "digits", cwd=tmp_path)
    done = run(binaries / "qflare-simulate", "run", "digits/config.toml", cwd=tmp_path)

    assert "next: qflare-simulate run digits/config.toml" in said
    assert "completed at version 20" in done
    best = re.search(r"best version \d+: accuracy (\d\.\d+) \(test data\)", done)
    assert best is not None, done
    assert float(best[1]) > 0.8
