"""Page tokens lead on from where they were given, and only in the query that gave them."""

import base64
import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare_server.errors import InvalidRequestError
from qflare_server.storage.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, PageRequest, page_token

KEYS = st.lists(st.one_of(st.text(), st.integers(-(2**53), 2**53)), min_size=1, max_size=3)


@given(key=KEYS, filters=st.lists(st.text(), max_size=2))
def test_token_gives_the_key_back(key: list[str | int], filters: list[str]) -> None:
    token = page_token(key, *filters)

    assert PageRequest(10, token).after(*filters) == key


@given(key=KEYS, ours=st.text(), theirs=st.text())
def test_token_of_another_query_is_refused(key: list[str | int], ours: str, theirs: str) -> None:
    token = page_token(key, "devices", ours)

    if ours == theirs:
        assert PageRequest(10, token).after("devices", theirs) == key
        return
    with pytest.raises(InvalidRequestError):
        PageRequest(10, token).after("devices", theirs)


def test_first_page_comes_after_nothing() -> None:
    assert PageRequest().after("devices") is None


@given(token=st.text(min_size=1))
def test_text_that_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError):
        PageRequest(10, token).after("devices")


@given(key=KEYS, other=KEYS)
def test_token_whose_key_was_changed_is_refused(
    key: list[str | int], other: list[str | int]
) -> None:
    stated, *_ = json.loads(base64.urlsafe_b64decode(page_token(key, "devices")))
    changed = base64.urlsafe_b64encode(json.dumps([stated, *other]).encode()).decode()

    if other == key:
        assert PageRequest(10, changed).after("devices") == key
        return
    with pytest.raises(InvalidRequestError):
        PageRequest(10, changed).after("devices")


@given(content=st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_json_that_is_no_token_is_refused(content: object) -> None:
    token = base64.urlsafe_b64encode(json.dumps(content).encode()).decode()

    with pytest.raises(InvalidRequestError):
        PageRequest(10, token).after("devices")


def test_size_of_a_page_has_a_default_and_a_bound() -> None:
    assert PageRequest().limit == DEFAULT_PAGE_SIZE
    assert PageRequest(1).limit == 1
    assert PageRequest(MAX_PAGE_SIZE).limit == MAX_PAGE_SIZE


@pytest.mark.parametrize("size", [-1, MAX_PAGE_SIZE + 1])
def test_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(InvalidRequestError, match="page_size"):
        _ = PageRequest(size).limit


@pytest.mark.parametrize(
    ("key", "kinds"),
    [
        (["x"], (int,)),
        ([2**63], (int,)),
        ([True], (int,)),
        ([None], (str,)),
        (["a\0b"], (str,)),
        ([5, 5], (datetime, int)),
        (["not a time", 5], (datetime, int)),
        (["2026-01-01T00:00:00", 5], (datetime, int)),
        (["2026-01-01T00:00:00+00:00"], (datetime, int)),
    ],
    ids=str,
)
def test_a_token_that_a_caller_made_has_to_have_a_key_of_the_query(
    key: list[Any], kinds: tuple[type, ...]
) -> None:
    token = page_token(key, "devices")

    with pytest.raises(InvalidRequestError):
        PageRequest(10, token).after("devices", kinds=kinds)


def test_a_token_of_nested_lists_is_none_of_a_query() -> None:
    token = base64.urlsafe_b64encode(b"[" * 100_000).decode()

    with pytest.raises(InvalidRequestError):
        PageRequest(10, token).after("devices", kinds=(str,))
