"""Well-formedness checks for signed statements, the same that verifiers apply.

Each signing context has one check, which the verifier's `open_` function applies as well. Code that signs for the
coordinator calls `check_form` on the exact bytes before signing, so that no statement is published that verifiers
reject.

The checks do not cover context such as keys, time or earlier statements (see `lineage.check_step`).
"""

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from qflare.crypto.signing import MAX_MESSAGE_BYTES, SigningContext
from qflare.evidence.lineage import check_model_form
from qflare.evidence.statements import (
    StatementError,
    check_evaluation_form,
    check_head_form,
    check_task_form,
    check_update_form,
)
from qflare.evidence.unmasking import check_answer_form, check_request_form
from qflare.protocol.enrollment import check_receipt_form
from qflare.protocol.keysets import check_document_form
from qflare.v1 import security_pb2

_MessageT = TypeVar("_MessageT", bound=Message)


def check_form(context: SigningContext, payload: bytes) -> None:
    """Check the bytes of a statement that is about to be signed.

    Args:
        context: Signing context of the statement.
        payload: The exact bytes to be signed.

    Raises:
        StatementError: The statement is malformed, or its context is never published.
    """
    check = FORMS.get(context)
    if check is None:
        raise StatementError(f"{context} is no statement that is published")
    if len(payload) > MAX_MESSAGE_BYTES:
        raise StatementError(
            f"{context}: got {len(payload)} bytes, want at most {MAX_MESSAGE_BYTES}"
        )
    try:
        check(payload)
    except StatementError:
        raise
    except (ValueError, DecodeError) as error:
        raise StatementError(f"{context}: {error}") from error


def _parsed(kind: type[_MessageT], check: Callable[[_MessageT], None]) -> Callable[[bytes], None]:
    return lambda payload: check(kind.FromString(payload))


def _document(context: SigningContext) -> Callable[[bytes], None]:
    return lambda payload: check_document_form(
        security_pb2.SignedEnvelope(payload=payload), context
    )


FORMS: Final[Mapping[SigningContext, Callable[[bytes], None]]] = {
    SigningContext.ROOT: _document(SigningContext.ROOT),
    SigningContext.KEYSET: _document(SigningContext.KEYSET),
    SigningContext.RECEIPT: _parsed(security_pb2.EnrollmentReceipt, check_receipt_form),
    SigningContext.TASK: _parsed(security_pb2.TaskStatement, check_task_form),
    SigningContext.UPDATE: _parsed(security_pb2.UpdateStatement, check_update_form),
    SigningContext.EVALUATION: _parsed(security_pb2.EvaluationStatement, check_evaluation_form),
    SigningContext.MODEL: _parsed(security_pb2.ModelStatement, check_model_form),
    SigningContext.TREE_HEAD: _parsed(security_pb2.TreeHead, check_head_form),
    SigningContext.UNMASKING_REQUEST: _parsed(security_pb2.UnmaskingRequest, check_request_form),
    SigningContext.UNMASKING_ANSWER: _parsed(security_pb2.UnmaskingAnswer, check_answer_form),
}
"""The check of each kind of statement that is signed once and read by others later."""
