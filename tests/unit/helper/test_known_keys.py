"""Keys that a helper remembers: the same bytes are loaded once, and all else is read anew."""

import pytest

from qflare.crypto.signing import InvalidKeyError, SigningKey
from qflare.v1 import security_pb2
from qflare_helper.known_keys import KnownKeys


def test_a_key_is_loaded_once() -> None:
    keys, shown = KnownKeys(), SigningKey.generate().public.to_proto()
    first = keys.read(shown)
    assert first.to_proto() == shown
    assert keys.read(security_pb2.PublicKey.FromString(shown.SerializeToString())) is first


def test_a_key_under_another_id_is_refused_also_if_it_is_known() -> None:
    keys = KnownKeys()
    shown, other = SigningKey.generate().public.to_proto(), SigningKey.generate().public.to_proto()
    keys.read(shown)
    for unread in (other.data, shown.data):
        with pytest.raises(InvalidKeyError):
            keys.read(
                security_pb2.PublicKey(key_id="0" * 64, algorithm=shown.algorithm, data=unread)
            )
    for changes in ({"algorithm": 99}, {"data": shown.data[:-1]}):
        changed = security_pb2.PublicKey.FromString(shown.SerializeToString())
        for name, value in changes.items():
            setattr(changed, name, value)
        with pytest.raises(InvalidKeyError):
            keys.read(changed)
    assert keys.read(other).to_proto() == other


def test_few_keys_are_remembered_those_that_were_used_last() -> None:
    keys = KnownKeys(most=2)
    one, two, three = (SigningKey.generate().public.to_proto() for _ in range(3))
    first, second = keys.read(one), keys.read(two)
    assert keys.read(one) is first
    keys.read(three)
    assert keys.read(one) is first
    assert keys.read(two) is not second
