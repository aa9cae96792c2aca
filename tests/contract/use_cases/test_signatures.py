"""Signatures of updates: verified against the key of the device, and kept with the update."""

from dataclasses import replace

import pytest

from qflare.crypto.signing import PublicKey, SigningKey
from qflare_server.errors import (
    InvalidRequestError,
    InvalidSignatureError,
)
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import ModelUpdate
from tests.contract.conftest import MakeCore
from tests.support.uploads import QUORUM_4, refuse
from tests.support.use_cases import CoordinatorHarness, Draft, vector


@pytest.fixture
def signing(make_core: MakeCore, signing_key: SigningKey) -> tuple[CoordinatorHarness, Draft]:
    """Return a coordinator that wants signatures, and a signed update of a device with a key."""
    core = make_core(require_signatures=True)
    contributor = core.add_signing_device("device-0", signing_key)
    draft = core.draft("device-0", core.start(rounds=QUORUM_4), vector(1.0))
    draft.device = contributor
    draft.statement.key_id = signing_key.public.key_id
    draft.signing_key = signing_key
    return core, draft


def test_signature_is_kept_with_the_update(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing

    core.send(draft)

    (row,) = core.updates(draft.statement.training_session_id, 1)
    assert row.key_id == draft.statement.key_id
    assert row.signature is not None


def test_update_without_a_signature_is_refused(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing
    draft.signing_key = None

    refuse(core, draft, InvalidSignatureError)


def test_signature_of_another_key_is_refused(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing
    draft.signing_key = SigningKey.generate()

    refuse(core, draft, InvalidSignatureError)


def test_signature_over_other_bytes_than_those_that_travel_is_refused(
    signing: tuple[CoordinatorHarness, Draft],
) -> None:
    core, draft = signing
    draft.statement.wire_digest = "0" * 64

    refuse(core, draft, InvalidRequestError)


def test_statement_changed_after_signing_is_refused(
    signing: tuple[CoordinatorHarness, Draft],
) -> None:
    core, draft = signing
    header = draft.header()
    draft.statement.example_count += 1
    header.statement.payload = draft.statement.SerializeToString(deterministic=True)

    with pytest.raises(InvalidSignatureError):
        core.uploads.submit(SYSTEM, draft.device, header, iter(draft.chunks))

    assert core.count(ModelUpdate) == 0


def test_signature_of_a_device_without_a_key_is_refused(
    core: CoordinatorHarness, draft: Draft, signing_key: SigningKey
) -> None:
    draft.signing_key = signing_key

    refuse(core, draft, InvalidSignatureError)


def test_two_signatures_are_refused(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing
    header = draft.header()
    header.statement.signatures.append(header.statement.signatures[0])

    with pytest.raises(InvalidSignatureError):
        core.uploads.submit(SYSTEM, draft.device, header, iter(draft.chunks))


def test_key_of_another_device_is_refused(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing
    other: PublicKey = SigningKey.generate().public
    draft.device = replace(draft.device, key_id=other.key_id, public_key=other.data)

    refuse(core, draft, InvalidSignatureError)
