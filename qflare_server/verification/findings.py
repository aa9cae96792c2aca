"""Findings of a verification, the keys of valid signers, and walks over tables in batches."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError
from sqlalchemy.orm import Session

from qflare.crypto.signing import PublicKey
from qflare.evidence.verification import SIGNING_ROLES
from qflare.protocol.keysets import KeyRole
from qflare_server.context import Context
from qflare_server.keys.trust_store import SignerKeys, published_signers
from qflare_server.storage.database import Database

BATCH: Final = 500
"""Number of rows in memory at a time."""
Key = TypeVar("Key")
Row = TypeVar("Row")


@dataclass(frozen=True)
class Finding:
    """A discrepancy: a record that differs from what the coordinator wrote.

    Attributes:
        kind: Kind of the record: keyset, audit, head, witness, device_key, device, model, update, round,
            evaluation or payload.
        subject: The record.
        problem: The discrepancy.
    """

    kind: str
    subject: str
    problem: str

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}: {self.problem}"


@dataclass
class Tally:
    """Counts of records that were checked, by kind, and of those that could not be, by reason."""

    checked: Counter[str] = field(default_factory=Counter)
    unchecked: Counter[str] = field(default_factory=Counter)


def read_signer_keys(
    context: Context, root_key_ids: Collection[str], root_threshold: int | None
) -> SignerKeys:
    """Return every key that has ever signed for the coordinator, by role.

    Args:
        context: The coordinator's dependencies.
        root_key_ids: Pinned ids of the keys of root document 1.
        root_threshold: Required number of their signatures; None means all.

    Raises:
        ValueError: The trust documents in the database do not chain to the pinned keys.
    """
    threshold = len(set(root_key_ids)) if root_threshold is None else root_threshold
    return published_signers(
        context.database, context.config.realm, root_key_ids, threshold, context.clock()
    )


NO_KEYS: Final[SignerKeys] = dict.fromkeys(SIGNING_ROLES, ())


@dataclass(frozen=True)
class PublishedRegistrars:
    """Gives the registrar keys among the keys of valid signers."""

    keys: SignerKeys

    def registrar_keys(self, *, fresh: bool = False) -> Collection[PublicKey]:
        """Return the registrar keys; `fresh` makes no difference, as one verification goes by one state of trust."""
        del fresh
        return self.keys[KeyRole.REGISTRAR]


def walk(
    database: Database,
    read: Callable[[Session, Key, int], Sequence[Row]],
    first: Key,
    key_of: Callable[[Row], Key],
) -> Iterator[Row]:
    """Yield all rows of a table in key order, `BATCH` at a time, without holding a transaction.

    Args:
        database: The database.
        read: Returns the next rows after a key, at most so many.
        first: A key before all others.
        key_of: Returns the key of a row.
    """
    after = first
    while True:
        with database.read() as session:
            rows = read(session, after, BATCH)
        if not rows:
            return
        after = key_of(rows[-1])
        yield from rows


def faults(
    kind: str,
    rows: Iterable[Row],
    check: Callable[[Row], Any],
    subject_of: Callable[[Row], str],
    tally: Tally,
) -> Iterator[Finding]:
    """Check rows one by one, count them, and yield findings.

    Args:
        kind: Kind of the rows in findings.
        rows: The rows.
        check: Raises an error for a modified row; see `problem_of`.
        subject_of: Returns the name of a row in findings.
        tally: Counts of the checked records.
    """
    for row in rows:
        tally.checked[kind] += 1
        problem = problem_of(check, row)
        if problem:
            yield Finding(kind, subject_of(row), problem)


def problem_of(check: Callable[..., Any], *arguments: object) -> str | None:
    """Run a check and return the problem; None if there is none."""
    try:
        check(*arguments)
    except (ValueError, DecodeError) as error:
        return str(error) or type(error).__name__
    return None


def differences(pairs: dict[str, tuple[object, object]]) -> list[str]:
    """Return the names of the columns whose value differs from the signed one."""
    return [name for name, (got, want) in pairs.items() if got != want]
