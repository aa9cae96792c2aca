"""`verify_bundle` answers any bundle, however malformed, with its one error."""

from datetime import UTC, datetime

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from qflare.evidence.verification import VerificationError, verify_bundle
from qflare.v1 import verification_pb2

PINS = ["ab" * 32]
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@given(st.binary(max_size=400))
def test_bytes_that_are_no_bundle_are_refused(data: bytes) -> None:
    try:
        bundle = verification_pb2.VerificationBundle.FromString(data)
    except DecodeError:
        return
    with pytest.raises(VerificationError):
        verify_bundle(bundle, PINS, NOW)


@given(realm=st.text(max_size=10), root=st.binary(max_size=60), keyset=st.binary(max_size=60))
def test_documents_that_are_none_are_refused(realm: str, root: bytes, keyset: bytes) -> None:
    bundle = verification_pb2.VerificationBundle(realm=realm)
    bundle.keyset.roots.add(payload=root)
    bundle.keyset.keyset.payload = keyset
    bundle.earlier_keysets.add(payload=keyset)

    with pytest.raises(VerificationError) as caught:
        verify_bundle(bundle, PINS, NOW)

    assert caught.value.step == "keyset"
