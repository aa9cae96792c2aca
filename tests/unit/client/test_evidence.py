import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.evidence.lineage import contribution_proof, contributors_digest, sign_model
from qflare.evidence.statements import digest_of, sign_update
from qflare.protocol.keysets import KeyRole
from qflare.v1 import security_pb2
from qflare_client.access.enrollment import read_bundle
from qflare_client.errors import InvalidEvidenceError, KeyStoreError
from qflare_client.trust.evidence import Evidence, UpdateEvidence, verify

NOW = datetime(2030, 1, 1, tzinfo=UTC)
REALM = "hospital"
SESSION = "7d2c1f70-9c8e-4a55-b3f1-5a1a7cf3a001"
DIGEST = hashlib.sha256(b"x").hexdigest()


@cache
def key(name: str) -> SigningKey:
    del name
    return SigningKey.generate()


@cache
def kem_key() -> KemKey:
    return KemKey.generate()


def time(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


@cache
def keyset() -> security_pb2.KeysetBundle:
    later = time(NOW + timedelta(days=1))
    root = security_pb2.RootDocument(
        realm=REALM, version=1, threshold=1, expire_time=later, keys=[key("root").public.to_proto()]
    )
    online = security_pb2.Keyset(realm=REALM, version=1, root_version=1, expire_time=later)
    online.keys.add(role=security_pb2.KEY_ROLE_SESSION_KEM, kem_key=kem_key().public.to_proto())
    for role in (KeyRole.MODEL, KeyRole.REGISTRAR, KeyRole.LOG, KeyRole.TASK):
        online.keys.add(
            role=security_pb2.KeyRole.ValueType(role),
            signature_key=key(role.name).public.to_proto(),
        )
    return security_pb2.KeysetBundle(
        roots=[sign_envelope(key("root"), SigningContext.ROOT, root)],
        keyset=sign_envelope(key("root"), SigningContext.KEYSET, online),
    )


@cache
def update(device: str) -> security_pb2.SignedEnvelope:
    statement = security_pb2.UpdateStatement(
        realm=REALM,
        training_session_id=SESSION,
        round_number=1,
        task_nonce=DIGEST,
        update_id=f"update of {device}",
        device_id=device,
        key_id=key(device).public.key_id,
        base_digest=DIGEST,
        layout_digest=DIGEST,
        payload_digest=DIGEST,
        wire_digest=DIGEST,
        example_count=1,
    )
    return sign_update(key(device), statement)


def update_digests(*devices: str) -> list[str]:
    return [digest_of(update(device).payload) for device in devices]


@cache
def versions() -> tuple[security_pb2.SignedEnvelope, ...]:
    initial = sign_model(key("MODEL"), model(0))
    first = sign_model(
        key("MODEL"),
        model(
            1,
            parent_digest=digest_of(initial.payload),
            base_version=0,
            contributor_count=2,
            contributors_digest=contributors_digest(update_digests("a", "b")),
        ),
    )
    return initial, first


def model(version: int, **facts: Any) -> security_pb2.ModelStatement:
    return security_pb2.ModelStatement(
        realm=REALM,
        training_session_id=SESSION,
        version=version,
        layout_digest=DIGEST,
        payload_digest=DIGEST,
        **{"base_version": -1, **facts},
    )


def receipt(device: str, **facts: Any) -> security_pb2.SignedEnvelope:
    message = security_pb2.EnrollmentReceipt(
        **{
            "realm": REALM,
            "device_id": device,
            "signature_key_id": key(device).public.key_id,
            **facts,
        }
    )
    return sign_envelope(key("REGISTRAR"), SigningContext.RECEIPT, message)


def update_evidence(device: str, **changes: Any) -> UpdateEvidence:
    (wanted,) = update_digests(device)
    evidence = UpdateEvidence(
        statement=update(device),
        public_key=key(device).public.to_proto(),
        version=1,
        proof=contribution_proof(update_digests("a", "b"), wanted),
        enrollment_receipt=receipt(device),
    )
    return replace(evidence, **changes)


def evidence(*updates: UpdateEvidence, **changes: Any) -> Evidence:
    return replace(Evidence(REALM, SESSION, keyset(), versions(), updates), **changes)


def check(given: Evidence, **changes: Any) -> list[str]:
    facts = {
        "root_key_ids": [key("root").public.key_id],
        "threshold": 1,
        "reference_time": NOW,
        **changes,
    }
    return verify(given, **facts)


def refuse(given: Evidence, **changes: Any) -> None:
    with pytest.raises(InvalidEvidenceError):
        check(given, **changes)


def test_a_history_is_shown() -> None:
    shown = check(evidence())

    assert "from the initial model on" in shown[1]
    assert len(shown) == 2


def test_a_later_beginning_is_said() -> None:
    assert "not in the evidence" in check(evidence(statements=versions()[1:]))[1]


def test_an_update_is_shown() -> None:
    shown = check(evidence(update_evidence("a")))

    assert "update of a is in version 1" in shown[2]
    assert "with the key that it enrolled" in shown[2]
    assert len(shown) == 3


def test_a_key_without_a_receipt_is_said() -> None:
    shown = check(evidence(update_evidence("a", enrollment_receipt=None)))

    assert "no receipt ties" in shown[2]


def test_all_updates_of_a_version_are_shown_to_be_all() -> None:
    shown = check(evidence(update_evidence("a"), update_evidence("b")))

    assert shown[-1] == "version 1 was made from these 2 updates alone"


def test_the_file_says_the_same() -> None:
    given = evidence(update_evidence("a"), update_evidence("b", enrollment_receipt=None))

    assert check(Evidence.from_json(given.to_json())) == check(given)


def test_other_root_keys_are_not_believed() -> None:
    refuse(evidence(), root_key_ids=[key("other").public.key_id])


def test_no_root_keys_are_not_believed() -> None:
    refuse(evidence(), root_key_ids=[])
    refuse(evidence(), threshold=0)


def test_expired_keys_are_not_believed() -> None:
    refuse(evidence(), reference_time=NOW + timedelta(days=2))


def test_no_version_shows_nothing() -> None:
    refuse(evidence(statements=[]))


def test_a_broken_chain_is_refused() -> None:
    refuse(evidence(statements=[versions()[1], versions()[0]]))


def test_a_version_of_another_signer_is_refused() -> None:
    refuse(evidence(statements=[sign_model(key("LOG"), model(0))]))


def test_another_realm_or_session_is_refused() -> None:
    refuse(evidence(realm="other"))
    refuse(evidence(training_session_id="other"))


def test_an_update_of_an_absent_version_is_refused() -> None:
    refuse(evidence(update_evidence("a", version=7)))


def test_an_update_of_another_version_is_refused() -> None:
    refuse(evidence(update_evidence("a", version=0)))


def test_an_update_that_is_not_in_it_is_refused() -> None:
    refuse(evidence(update_evidence("a", statement=update("c"))))


def test_an_update_of_another_key_is_refused() -> None:
    refuse(evidence(update_evidence("a", public_key=key("b").public.to_proto())))


@pytest.mark.parametrize(
    "facts",
    [{"device_id": "b"}, {"realm": "other"}, {"signature_key_id": DIGEST}],
)
def test_a_receipt_for_something_else_is_refused(facts: dict[str, str]) -> None:
    refuse(evidence(update_evidence("a", enrollment_receipt=receipt("a", **facts))))


def test_a_receipt_of_another_signer_is_refused() -> None:
    forged = sign_envelope(
        key("MODEL"),
        SigningContext.RECEIPT,
        security_pb2.EnrollmentReceipt.FromString(receipt("a").payload),
    )

    refuse(evidence(update_evidence("a", enrollment_receipt=forged)))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "qflare-evidence-2"}', '{"format": "qflare-evidence-1"}']
)
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(InvalidEvidenceError):
        Evidence.from_json(text)


@given(st.data())
def test_a_changed_file_is_refused_or_says_the_same(data: st.DataObject) -> None:
    given_evidence = evidence(update_evidence("a"))
    text = given_evidence.to_json()
    place = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.sampled_from('0aA"{}[],:/ '))
    try:
        changed = Evidence.from_json(text[:place] + character + text[place + 1 :])
        shown = check(changed)
    except InvalidEvidenceError:
        return

    # What is left out of the file is left out of what is shown; nothing else may be shown.
    assert set(shown) <= {
        *check(given_evidence),
        *check(evidence(update_evidence("a", enrollment_receipt=None))),
    }


def test_a_file_of_a_later_release_says_what_to_upgrade() -> None:
    later = json.loads(evidence(update_evidence("a")).to_json())
    later["updates"][0]["statement"]["signatures"][0]["algorithm"] = "SIGNATURE_ALGORITHM_OF_2030"

    with pytest.raises(InvalidEvidenceError, match="upgrade qflare"):
        Evidence.from_json(json.dumps(later))
    with pytest.raises(InvalidEvidenceError, match="upgrade qflare"):
        Evidence.from_json('{"format": "qflare-evidence-2"}')


def test_a_bootstrap_bundle_of_a_later_release_says_what_to_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    path.write_text('{"realm": "qflare", "of2030": true}')

    with pytest.raises(KeyStoreError, match="upgrade qflare"):
        read_bundle(path)
