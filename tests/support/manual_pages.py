"""Runs a page of the manual: its shell blocks in order, in an empty folder, against what they themselves start.

Blocks of language `sh` are run. A Python block that begins with a comment of a file name becomes that file. A `json`
block after a shell block is the transcript of what it printed: every value is compared but for ids, digests, secrets,
times and sizes. Ports 50051 and 8080 of the page become free ones.
`python -m tests.support.manual_pages PAGE` runs a page and writes what was printed into its transcripts.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
PROGRAMS: Final = Path(sys.executable).parent
PORTS: Final = ("50051", "8080")
MARK: Final = "@@@"
TIMEOUT_S: Final = 300
BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE: Final = re.compile(r"# ([\w.]+\.py)\n")
VOLATILE: Final = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}|qf[a-z]1\.[0-9a-f]{32}\.[\w-]+|\b[0-9a-f]{16,}\b|\b[0-9a-f]{8}\b"
    r"|\d{4}-\d\d-\d\dT[\d:.]+Z|\d+(?:\.\d+)?s\b|:\d+\b|[A-Za-z0-9+/]{60,}=*|\b\d{4,}\b"
)
FLEETING: Final = frozenset(
    {
        "pool_in_use_count",
        "unsequenced_audit_count",
        "leaf_index",
        "peer_address",
        "next_page_token",
        "payload_count",
        "pruned_payload_count",
        "replica_id",
    }
)
PREAMBLE: Final = """\
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
"""


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    language: str
    code: str
    start: int
    stop: int


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page; start and stop are where the code stands in it."""
    return [
        Block(found[1], found[2], found.start(2), found.end(2)) for found in BLOCK.finditer(text)
    ]


def free_port() -> str:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_page(text: str, folder: Path, path: str, programs: Path = PROGRAMS) -> list[str]:
    """Run a page and return what each of its shell blocks printed.

    Args:
        text: The page.
        folder: Where it is run.
        path: Folder of further programs.
        programs: Folder of Python and the commands of QFLARE.

    Raises:
        AssertionError: A command failed; the message holds all that was printed.
    """
    ports = {port: free_port() for port in PORTS}
    script = PREAMBLE
    for block in blocks(text):
        code = block.code
        for named, free in ports.items():
            code = code.replace(named, free)
        if block.language == "sh":
            script += f"echo; echo '{MARK}'\n{code}"
        elif block.language == "python" and (found := FILE.match(code)):
            (folder / found[1]).write_text(code)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(folder, path, programs),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    printed = done.stdout
    for named, free in ports.items():
        printed = printed.replace(free, named)
    return [part.strip("\n") for part in printed.split(MARK)[1:]]


def environment(folder: Path, path: str, programs: Path = PROGRAMS) -> dict[str, str]:
    """Return an environment with nothing of the person who runs the tests in it."""
    kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    return kept | {
        "PATH": os.pathsep.join([str(programs), path, os.defpath]),
        "HOME": str(folder),
        "PYTHONPATH": str(folder),
        "PYTHONWARNINGS": "ignore",
    }


def transcripts(text: str) -> Iterator[tuple[int, Block]]:
    """Yield the transcripts of a page, each with the number of the shell block that it belongs to."""
    number = -1
    previous = ""
    for block in blocks(text):
        if block.language == "sh":
            number += 1
        elif block.language == "json" and previous == "sh":
            yield number, block
        previous = block.language


def decode(text: str) -> list[Any]:
    """Return the JSON values that stand one after the other in a text."""
    decoder, found, place = json.JSONDecoder(), [], 0
    while place < len(text):
        value, stop = decoder.raw_decode(text, place)
        found.append(value)
        place = stop + len(text[stop:]) - len(text[stop:].lstrip())
    return found


def steady(value: Any) -> Any:
    """Return a JSON value with everything that changes from run to run taken out."""
    if isinstance(value, dict):
        return {name: steady(item) for name, item in value.items() if name not in FLEETING}
    if isinstance(value, list):
        return [steady(item) for item in value]
    return VOLATILE.sub("*", value) if isinstance(value, str) else value


def refresh(page: Path, path: str) -> None:
    """Run a page and write what was printed into its transcripts."""
    text = page.read_text()
    with tempfile.TemporaryDirectory() as folder:
        printed = run_page(text, Path(folder), path)
    for number, block in reversed(list(transcripts(text))):
        values = decode(printed[number].strip())
        shown = "\n".join(json.dumps(value, indent=2) for value in values)
        text = f"{text[: block.start]}{shown}\n{text[block.stop :]}"
    page.write_text(text)


if __name__ == "__main__":
    refresh(Path(sys.argv[1]), str(ROOT / ".tools"))
