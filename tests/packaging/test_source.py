"""Rules of the coordinator's source that neither ruff nor mypy knows."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qflare_server.storage.tables import Base

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "qflare",
    "qflare_client",
    "qflare_helper",
    "qflare_server",
    "qflare_simulation",
    "migrations",
    "docs",
    "examples",
    "deploy",
)
TEXTS = {".py", ".md", ".html", ".sh", ".yaml"}
CALLED_BY_LIBRARIES = {
    "accept",
    "connection_lost",
    "connection_made",
    "create_server",
    "data_received",
    "handle_events",
    "http_open",
    "https_open",
    "intercept_service",
    "on_response_complete",
    "process_bind_param",
    "process_result_value",
    "redirect_request",
}
CALLED_BY_PROGRAMS = {"from_mapping"}
MAX_NAME_CHARACTERS = 60
"""Longer strings are prose, which names what is gone as well."""


def program_files() -> Iterator[Path]:
    for folder in PROGRAM:
        files = (ROOT / folder).rglob("*")
        yield from (item for item in files if item.suffix in TEXTS and "_pb2" not in item.name)


def server_modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "qflare_server").rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def names_in(tree: ast.Module) -> Iterator[str]:
    """Yield what code names: variables, attributes, imports, and words of short strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(
                r"\w+", node.value if len(node.value) <= MAX_NAME_CHARACTERS else ""
            )


def test_nothing_of_the_server_is_for_tests_only() -> None:
    """A function, class or method that no code and no manual names is dead, however well it is tested."""
    words: Counter[str] = Counter()
    for path in program_files():
        text = path.read_text()
        names = names_in(ast.parse(text)) if path.suffix == ".py" else re.findall(r"\w+", text)
        words.update(names)

    dead = [
        f"{path}:{node.lineno}: {node.name}"
        for path, tree in server_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.decorator_list
        and not node.name.startswith("__")
        and node.name not in CALLED_BY_LIBRARIES | CALLED_BY_PROGRAMS
        and not words[node.name]
    ]

    assert dead == []


MAPPED = {mapper.class_.__name__ for mapper in Base.registry.mappers}
LOADS_OBJECTS = {
    "add",
    "expire",
    "expire_all",
    "expunge",
    "expunge_all",
    "get",
    "merge",
    "query",
    "refresh",
    "scalar",
}


def test_no_statement_loads_a_mapped_object() -> None:
    """Rows leave their transaction as frozen values: an object of a session would have to be taken out of it."""
    calls = [
        f"{path}:{node.lineno}: session.{node.attr}"
        for path, tree in server_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "session"
        and node.attr in LOADS_OBJECTS
    ]

    assert calls == []


def test_mapped_classes_are_named_for_their_tables_only() -> None:
    faults = []
    for path, tree in server_modules():
        if path.parts[:3] == ("qflare_server", "storage", "tables"):
            continue
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and "storage.tables" in (node.module or "")
            for alias in node.names
            if alias.name in MAPPED
        }
        tables = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "__table__"
        }
        faults += [
            f"{path}:{node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if id(node) not in tables
            and (
                (isinstance(node, ast.Name) and node.id in imported)
                or (
                    isinstance(node, ast.Attribute)
                    and node.attr in MAPPED
                    and ast.unparse(node.value) == "tables"
                )
            )
        ]

    assert faults == []


WALL_CLOCKS = {
    "qflare/ids.py": "ids are ordered by time; no duration is measured",
    "qflare_client/__main__.py": "the moment for which a bundle is verified",
    "qflare_client/access/login.py": "rest of a token's life, then measured by the monotonic clock",
    "qflare_client/admin/login.py": "rest of the life of a provider's token",
    "qflare_client/flower/messages.py": "creation time that a message to a Flower app states",
    "qflare_client/trust/keyset.py": "expiry of trust documents by the device's own clock",
    "qflare_server/cli/certificates.py": "validity of the certificates that a command makes",
    "qflare_server/cli/keys.py": "issue times of the documents that a command signs",
    "qflare_server/cli/offline_root.py": "issue times of the documents that a command signs",
    "qflare_server/cli/webhooks.py": "the moment that a test message states",
    "qflare_server/context.py": "the function for commands that no coordinator runs",
    "qflare_server/keys/setup.py": "issue times of the first trust documents",
    "qflare_server/storage/backups.py": "the name of a backup",
    "qflare_server/storage/payload_store/bucket.py": "when obstore asks for credentials again, by its own clock",
    "qflare_server/storage/steady_clock.py": "the clock of the coordinator, without jumps",
}
"""Modules that read the clock of the machine, and for what: never to measure a wait, a lease or an interval, because
that clock can be set at any time. The coordinator's own time is `Context.clock`."""
CLOCK_READS = {"now", "utcnow", "today", "time", "time_ns", "localtime", "gmtime"}


def reads_wall_clock(tree: ast.Module) -> bool:
    """Return whether a module calls or names what reads the clock of the machine."""
    return any(
        (
            isinstance(node, ast.Attribute)
            and node.attr in CLOCK_READS
            and isinstance(node.value, ast.Name)
            and node.value.id in {"time", "datetime", "date"}
        )
        or (isinstance(node, ast.Name) and node.id == "utc_now")
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "time"
            and any(alias.name in CLOCK_READS for alias in node.names)
        )
        for node in ast.walk(tree)
    )


def test_no_other_module_reads_the_clock_of_the_machine() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("qflare", "qflare_client", "qflare_server")
        for path in (ROOT / folder).rglob("*.py")
        if "_pb2" not in path.name and reads_wall_clock(ast.parse(path.read_text()))
    }

    assert found == WALL_CLOCKS.keys()


DOCUMENT_PARSERS = {"json.loads", "json.load", "tomllib.loads", "tomllib.load"}
MALFORMED = {"ValueError", "JSONDecodeError", "TOMLDecodeError"}


def caught_by(node: ast.Try) -> set[str]:
    """Return the last names of the exceptions that a statement catches."""
    kinds = [handler.type for handler in node.handlers if handler.type is not None]
    flat = [
        item for kind in kinds for item in (kind.elts if isinstance(kind, ast.Tuple) else [kind])
    ]
    return {ast.unparse(item).rpartition(".")[2] for item in flat}


def test_whoever_refuses_a_malformed_document_refuses_one_that_is_nested_too_deeply() -> None:
    careless = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in program_files()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Try)
        and caught_by(node) & MALFORMED
        and "RecursionError" not in caught_by(node)
        and any(
            isinstance(call, ast.Call) and ast.unparse(call.func) in DOCUMENT_PARSERS
            for statement in node.body
            for call in ast.walk(statement)
        )
    ]

    assert careless == []
