"""Receipts that a helper remembers: one that verified is not verified again, and any other byte or key is."""

from typing import Final

import pytest

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import PublicKey, SigningContext, SigningKey
from qflare.evidence.statements import StatementError
from qflare.v1 import security_pb2
from qflare_helper.receipts import VerifiedReceipts

REGISTRAR: Final = SigningKey.generate()
OTHER: Final = SigningKey.generate()
TRUSTED: Final = (REGISTRAR.public, OTHER.public)


def receipt(device_id: str = "device", key: SigningKey = REGISTRAR) -> security_pb2.SignedEnvelope:
    statement = security_pb2.EnrollmentReceipt(realm="qflare", device_id=device_id)
    return sign_envelope(key, SigningContext.RECEIPT, statement)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Give the messages whose signatures are verified."""
    messages: list[bytes] = []
    verify = PublicKey.verify

    def counting(key: PublicKey, context: SigningContext, message: bytes, signature: bytes) -> None:
        messages.append(message)
        verify(key, context, message, signature)

    monkeypatch.setattr(PublicKey, "verify", counting)
    return messages


def test_a_receipt_is_verified_once(verified: list[bytes]) -> None:
    receipts, shown = VerifiedReceipts(), receipt()
    opened = [receipts.open(shown, TRUSTED) for _ in range(3)]
    assert [item.device_id for item in opened] == ["device"] * 3
    assert verified == [shown.payload]
    receipts.open(shown, TRUSTED[::-1])  # the order of the keys does not matter
    assert len(verified) == 1


def test_whatever_differs_is_verified_again() -> None:
    receipts, shown = VerifiedReceipts(), receipt()
    receipts.open(shown, TRUSTED)
    payload = security_pb2.EnrollmentReceipt(realm="qflare", device_id="another")
    moved = security_pb2.SignedEnvelope(
        payload=payload.SerializeToString(), signatures=shown.signatures
    )
    damaged = security_pb2.SignedEnvelope.FromString(shown.SerializeToString())
    damaged.signatures[0].signature = bytes(len(damaged.signatures[0].signature))
    unsigned = security_pb2.SignedEnvelope(payload=shown.payload)
    for _ in range(2):  # a refusal is not remembered as anything else
        for envelope in (moved, damaged, unsigned):
            with pytest.raises(StatementError):
                receipts.open(envelope, TRUSTED)
        with pytest.raises(StatementError):
            receipts.open(shown, (OTHER.public,))
    assert receipts.open(shown, TRUSTED).device_id == "device"


def test_the_receipts_that_were_not_shown_for_the_longest_time_are_forgotten(
    verified: list[bytes],
) -> None:
    receipts, shown = VerifiedReceipts(most=2), [receipt(name) for name in "abc"]
    for index in (0, 1, 0, 2):  # the third takes the place of the second
        receipts.open(shown[index], TRUSTED)
    verified.clear()
    for index in (0, 2, 1):
        receipts.open(shown[index], TRUSTED)
    assert verified == [shown[1].payload]
