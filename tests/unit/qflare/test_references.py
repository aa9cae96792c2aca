"""What a reference to a device or a training session means among its candidates."""

import pytest

from qflare.references import ManyMeantError, Named, choose, is_whole_id, party, short_id

UUID = "5f0c31aa-7d5e-4f5e-9d22-4d90f5cc3163"
WARD = Named(UUID, "ward-2")


def test_the_only_candidate_is_meant() -> None:
    assert choose("ward-2", [WARD]) == UUID
    assert choose("ward-2", []) is None


def test_an_id_wins_over_names_and_longer_ids() -> None:
    assert choose("ward", [Named("ward-1", "ward"), Named("ward", "other")]) == "ward"


def test_many_candidates_are_listed_with_their_ids() -> None:
    many = [Named(f"device-{number}", f"ward-{number}") for number in range(12)]

    with pytest.raises(ManyMeantError) as refusal:
        choose("device", many)

    assert "'device' may be ward-0 (device-0), ward-1 (device-1)" in str(refusal.value)
    assert str(refusal.value).endswith("ward-9 (device-9), ...")


def test_only_a_uuid_is_whole_for_certain() -> None:
    assert is_whole_id(UUID)
    assert not is_whole_id(UUID.upper())
    assert not is_whole_id(UUID[:-1])
    assert not is_whole_id("ward-2")


def test_parties_are_shown_with_name_and_short_id() -> None:
    assert party(f"device:{UUID}", "ward-2") == "device:ward-2 (5f0c31aa)"
    assert party("admin:alice", "") == "admin:alice"
    assert short_id("device-1") == "device-1"
