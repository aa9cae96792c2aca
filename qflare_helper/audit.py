"""Verification of a helper's ledger: every answer is signed, numbered without gaps, and names the one before."""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from qflare.crypto.signing import PublicKey
from qflare.evidence.statements import StatementError, digest_of
from qflare.evidence.unmasking import open_answer
from qflare_helper.ledger import Ledger


@dataclass(frozen=True)
class AuditReport:
    """Result of a verification.

    Attributes:
        answer_count: Answers that were checked.
        update_count: Updates in them.
        latest_digest: Digest of the last answer; empty without any.
        problems: What does not verify; empty if everything does.
    """

    answer_count: int
    update_count: int
    latest_digest: str
    problems: tuple[str, ...]


def verify_ledger(ledger: Ledger, key: PublicKey) -> AuditReport:
    """Check every answer of a ledger.

    Args:
        ledger: The ledger.
        key: The helper's signature key.
    """
    problems, previous, count, updates = [], "", 0, 0
    for counter, envelope, member_count in ledger.answers():
        count += 1
        updates += member_count
        try:
            answer = open_answer(envelope, key)
        except (StatementError, DecodeError) as error:
            problems.append(f"answer {counter}: {error}")
            previous = digest_of(envelope.payload)
            continue
        if not counter == answer.counter == count:
            problems.append(f"answer {counter}: want number {count}, signed as {answer.counter}")
        if answer.previous_digest != previous:
            problems.append(f"answer {counter}: does not name the answer before it")
        if answer.member_count != member_count:
            problems.append(
                f"answer {counter}: {member_count} updates recorded, signed {answer.member_count}"
            )
        previous = digest_of(envelope.payload)
    return AuditReport(count, updates, previous, tuple(problems))
