"""Which keys are a device's, by receipts and rotations: the product and the independent verifier agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import pytest

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.evidence.device_keys import ProvenKeys
from qflare.evidence.statements import sign_rotation
from qflare.v1 import security_pb2
from qflare.v1.verification_pb2 import DeviceKeyEvidence
from tests.independent.bundle import open_device_keys
from tests.independent.verifier import RefusedError

REGISTRAR: Final = SigningKey.generate()
DEVICE: Final = "device"
KEM: Final = KemKey.generate().public
Accept = Callable[[Sequence[DeviceKeyEvidence]], None]


@dataclass
class History:
    """Keys of one device by name, and how it came to them."""

    keys: dict[str, SigningKey] = field(default_factory=dict)

    def key(self, name: str) -> SigningKey:
        return self.keys.setdefault(name, SigningKey.generate())

    def receipt(
        self,
        name: str,
        count: int = 0,
        *,
        device_id: str = DEVICE,
        registrar: SigningKey = REGISTRAR,
        realm: str = "qflare",
    ) -> DeviceKeyEvidence:
        statement = security_pb2.EnrollmentReceipt(
            realm=realm,
            device_id=device_id,
            signature_key_id=self.key(name).public.key_id,
            kem_key_id=KEM.key_id,
            key_rotation_count=count,
        )
        return DeviceKeyEvidence(
            device_id=DEVICE,
            key=self.key(name).public.to_proto(),
            receipt=sign_envelope(registrar, SigningContext.RECEIPT, statement),
        )

    def rotation(self, name: str, following: str, number: int) -> DeviceKeyEvidence:
        before, after = self.key(name), self.key(following)
        statement = security_pb2.KeyRotation(
            realm="qflare",
            device_id=DEVICE,
            sequence_number=number,
            previous_key_id=before.public.key_id,
            signature_key=after.public.to_proto(),
            kem_key=KEM.to_proto(),
        )
        return DeviceKeyEvidence(
            device_id=DEVICE,
            key=after.public.to_proto(),
            rotation=sign_rotation(before, after, statement),
        )


def product(evidence: Sequence[DeviceKeyEvidence]) -> None:
    keys = ProvenKeys("qflare", [REGISTRAR.public])
    for item in evidence:
        keys.add(item)


def independent(evidence: Sequence[DeviceKeyEvidence]) -> None:
    public = REGISTRAR.public
    open_device_keys(evidence, {public.key_id: public.to_proto()}, "qflare")


GOOD: Final[dict[str, Callable[[History], list[DeviceKeyEvidence]]]] = {
    "a receipt": lambda it: [it.receipt("a")],
    "a rotation": lambda it: [it.receipt("a"), it.rotation("a", "b", 1)],
    "two rotations": lambda it: [
        it.receipt("a"),
        it.rotation("a", "b", 1),
        it.rotation("b", "c", 2),
    ],
    "enrolled again": lambda it: [
        it.receipt("a"),
        it.rotation("a", "b", 1),
        it.receipt("c", 2),
        it.rotation("c", "d", 3),
    ],
    "the same twice": lambda it: [it.receipt("a"), it.receipt("a")],
}
BAD: Final[dict[str, Callable[[History], list[DeviceKeyEvidence]]]] = {
    "nothing": lambda it: [DeviceKeyEvidence(device_id=DEVICE, key=it.key("a").public.to_proto())],
    "a skipped number": lambda it: [it.receipt("a"), it.rotation("a", "b", 2)],
    "a repeated number": lambda it: [
        it.receipt("a"),
        it.rotation("a", "b", 1),
        it.rotation("b", "c", 1),
    ],
    "a number from the start": lambda it: [it.receipt("a", 4), it.rotation("a", "b", 1)],
    "a fork": lambda it: [it.receipt("a"), it.rotation("a", "b", 1), it.rotation("a", "c", 1)],
    "a fork by receipts": lambda it: [it.receipt("a"), it.receipt("b")],
    "a fork of both kinds": lambda it: [
        it.receipt("a"),
        it.rotation("a", "b", 1),
        it.receipt("c", 1),
    ],
    "a rotation from nowhere": lambda it: [it.receipt("a"), it.rotation("x", "b", 1)],
    "a receipt of another device": lambda it: [it.receipt("a", device_id="other")],
    "a receipt of another realm": lambda it: [it.receipt("a", realm="other")],
    "a receipt by a stranger": lambda it: [it.receipt("a", registrar=SigningKey.generate())],
}


@pytest.mark.parametrize("accept", [product, independent])
@pytest.mark.parametrize("name", GOOD)
def test_a_history_is_accepted(name: str, accept: Accept) -> None:
    accept(GOOD[name](History()))


@pytest.mark.parametrize("accept", [product, independent])
@pytest.mark.parametrize("name", BAD)
def test_a_history_is_refused(name: str, accept: Accept) -> None:
    with pytest.raises((ValueError, RefusedError)):
        accept(BAD[name](History()))


def test_a_fork_takes_the_keys_of_both_branches_away() -> None:
    history = History()
    keys = ProvenKeys("qflare", [REGISTRAR.public])
    for item in GOOD["two rotations"](history):
        keys.add(item)
    with pytest.raises(ValueError, match="forked"):
        keys.add(history.rotation("a", "fork", 1))

    assert keys.get(DEVICE, history.key("a").public.key_id) == history.key("a").public
    for name in ("b", "c"):
        with pytest.raises(ValueError, match="forked"):
            keys.get(DEVICE, history.key(name).public.key_id)
