"""Lines of a witness file: read back as written, and refused when text and envelope disagree."""

import base64

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.evidence.checkpoints import checkpoint_line, parse_checkpoint_line
from qflare.evidence.statements import StatementError, open_tree_head
from qflare.v1 import security_pb2


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="module")
def envelope(key: SigningKey) -> security_pb2.SignedEnvelope:
    head = security_pb2.TreeHead(
        origin="qflare/audit",
        size=17,
        root_digest="ab" * 32,
        create_time=Timestamp(seconds=1_767_323_045),
    )
    return sign_envelope(key, SigningContext.TREE_HEAD, head)


def test_a_line_says_origin_size_root_and_time(envelope: security_pb2.SignedEnvelope) -> None:
    line = checkpoint_line(envelope)

    assert line.startswith(
        "qflare/audit 17 q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6s= 2026-01-02T03:04:05Z "
    )
    assert line.endswith("\n")
    assert line.count("\n") == 1


def test_a_line_is_read_back(key: SigningKey, envelope: security_pb2.SignedEnvelope) -> None:
    read = parse_checkpoint_line(checkpoint_line(envelope))

    assert open_tree_head(read, [key.public], "qflare/audit").size == 17


@pytest.mark.parametrize("place", range(4))
def test_a_line_whose_text_was_changed_is_refused(
    envelope: security_pb2.SignedEnvelope, place: int
) -> None:
    words = checkpoint_line(envelope).split(" ")
    words[place] = words[place][:-1] + "9"

    with pytest.raises(StatementError):
        parse_checkpoint_line(" ".join(words))


def test_an_envelope_that_is_no_head_is_refused() -> None:
    with pytest.raises(StatementError):
        checkpoint_line(security_pb2.SignedEnvelope(payload=b"\xff"))


def test_a_head_with_a_malformed_root_is_refused() -> None:
    head = security_pb2.TreeHead(origin="o", root_digest="zz").SerializeToString()

    with pytest.raises(StatementError):
        checkpoint_line(security_pb2.SignedEnvelope(payload=head))


@given(st.text(max_size=200))
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(StatementError):
        parse_checkpoint_line(text)


@given(st.binary(max_size=200))
def test_other_bytes_in_base64_are_refused(data: bytes) -> None:
    with pytest.raises(StatementError):
        parse_checkpoint_line(
            f"qflare/audit 17 AA== 2026-01-02T03:04:05Z {base64.b64encode(data).decode()}"
        )
