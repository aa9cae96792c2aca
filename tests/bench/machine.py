"""What the figures were measured on: without it they mean nothing."""

import hashlib
import os
import platform
import sqlite3
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.bench.figures import MIB, throughput
from tests.support.postgresql import installed_prefix

ROOT = Path(__file__).resolve().parents[2]
HASHED_BYTES = 64 * MIB
LIBRARIES = ("grpcio", "protobuf", "numpy", "sqlalchemy", "psycopg2-binary", "cryptography")


def describe() -> Mapping[str, str]:
    """Return the facts of this machine and of what runs on it, by name."""
    return {
        "Processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "Extensions": ", ".join(_extensions()) or "none for SHA or AVX",
        "SHA-256, one core": throughput(HASHED_BYTES, _hash_s()),
        "Memory": f"{_memory_bytes() / 2**30:.1f} GiB",
        "System": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "Libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "Databases": f"SQLite {sqlite3.sqlite_version}, PostgreSQL {_postgresql()}",
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _extensions() -> Sequence[str]:
    """Return the processor's extensions for SHA and AVX, as Linux names them (x86: flags, ARM: Features)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, words = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return sorted(
                word for word in words.split() if word.startswith(("sha", "avx", "asimd"))
            )
    return ()


def _hash_s() -> float:
    """Return the processor seconds in which one core hashes `HASHED_BYTES`; the best of five."""
    data = bytes(MIB)
    seconds = []
    for _ in range(5):
        begun = time.thread_time()
        for _ in range(HASHED_BYTES // MIB):
            hashlib.sha256(data).digest()
        seconds.append(time.thread_time() - begun)
    return min(seconds)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _postgresql() -> str:
    prefix = installed_prefix()
    if prefix is None:
        return "not installed"
    shown = subprocess.run(
        [prefix / "bin" / "postgres", "--version"], capture_output=True, text=True, check=True
    )
    return shown.stdout.split()[-1]


def _commit() -> str:
    def git(*words: str) -> str:
        shown = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return shown.stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}"
