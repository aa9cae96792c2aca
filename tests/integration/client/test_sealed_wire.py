"""A device of a sealed training session whose every message passes through somebody else's hands."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from qflare.crypto.sealed_payloads import Direction, PayloadSealer, SealContext
from qflare.crypto.sealing import KemKey
from qflare.v1 import coordinator_service_pb2 as messages
from qflare_client import (
    Client,
    CorruptModelError,
    RetryPolicy,
    TaskKind,
    enroll,
)
from tests.integration.client.conftest import Relay
from tests.integration.conftest import Deployment
from tests.support.sealing import LARGE, MARK, ROUND_COUNT, next_task, start, train_once

PATIENCE = RetryPolicy(total_time_s=10, initial_delay_s=0.01, max_delay_s=0.05)
Header = messages.GlobalModelHeader


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy()


@pytest.fixture
def line(deployment: Deployment, relay: Callable[[str], Relay]) -> Relay:
    return relay(deployment.coordinator.address)


@pytest.fixture
def client(deployment: Deployment, line: Relay, tmp_path: Path) -> Iterator[Client]:
    home = tmp_path / "device"
    enroll(deployment.bundle(), home=home, address=line.address, retry=PATIENCE)
    with Client(home=home, retry=PATIENCE) as made:
        yield made


@pytest.fixture
def session_id(deployment: Deployment) -> str:
    return start(deployment, LARGE)


def watch(line: Relay) -> list[bytes]:
    """Note every message that passes."""
    seen: list[bytes] = []

    def note(message: Message) -> Message:
        seen.append(message.SerializeToString())
        return message

    for method in ("SubmitUpdate", "GetGlobalModel", "GetTask", "GetUpload", "GetLineage"):
        line.on_request[method] = line.on_answer[method] = note
    return seen


def test_payloads_are_not_seen_on_the_way(line: Relay, client: Client, session_id: str) -> None:
    seen = watch(line)

    for _ in range(ROUND_COUNT):
        train_once(client, session_id)

    assert next_task(client, session_id).kind is TaskKind.DONE
    assert sum(map(len, seen)) > 2 * ROUND_COUNT * 4 * LARGE
    assert not any(MARK in message for message in seen)


def test_payloads_are_seen_where_they_are_not_sealed(
    deployment: Deployment, line: Relay, client: Client
) -> None:
    session_id = start(deployment, transfer={"sealed": False})
    seen = watch(line)

    train_once(client, session_id)

    assert any(MARK in message for message in seen)


def spoil(line: Relay, change: Callable[[messages.GetGlobalModelResponse], None]) -> None:
    """Change every message of a download."""

    def apply(message: messages.GetGlobalModelResponse) -> messages.GetGlobalModelResponse:
        other = copy.deepcopy(message)
        change(other)
        return other

    line.on_answer["GetGlobalModel"] = apply


def refused(client: Client, session_id: str) -> None:
    """Download a version that must not be believed; the next one that is right is."""
    with pytest.raises(CorruptModelError):
        client.download(session_id)


def flip(data: bytes, place: int) -> bytes:
    """Return bytes with one bit changed."""
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_a_changed_segment_is_not_believed(
    line: Relay, client: Client, session_id: str, place: int
) -> None:
    def change(message: messages.GetGlobalModelResponse) -> None:
        if message.chunk.index == 1:
            message.chunk.data = flip(message.chunk.data, place)

    spoil(line, change)

    refused(client, session_id)


@pytest.mark.parametrize("numbers", [[1, 0, 2], [0, 0, 2], [0, 2], [0, 1]])
def test_segments_in_another_order_are_not_believed(
    line: Relay, client: Client, session_id: str, numbers: list[int]
) -> None:
    relayed = line._forward

    def forward(name: str, request: Any, context: Any) -> Any:
        answer = relayed(name, request, context)
        if name != "GetGlobalModel":
            return answer
        chunks = list(answer)
        header = chunks[0].header
        sent = []
        for place, number in enumerate(numbers):
            message = messages.GetGlobalModelResponse()
            message.chunk.index, message.chunk.data = place, chunks[number].chunk.data
            sent.append(message)
        sent[0].header.CopyFrom(header)
        return sent

    line._forward = forward  # type: ignore[method-assign]

    refused(client, session_id)


def _drop_seal(header: Header) -> None:
    header.ClearField("sealed")


def _drop_key(header: Header) -> None:
    del header.sealed.wrapped_keys[:]


def _add_key(header: Header) -> None:
    header.sealed.wrapped_keys.append(header.sealed.wrapped_keys[0])


def _change_key(header: Header) -> None:
    wrapped = header.sealed.wrapped_keys[0]
    wrapped.sealed_key = flip(wrapped.sealed_key, -1)


def _shorten_key(header: Header) -> None:
    wrapped = header.sealed.wrapped_keys[0]
    wrapped.sealed_key = wrapped.sealed_key[:-1]


def _wrap_for_another(header: Header) -> None:
    wrapped = header.sealed.wrapped_keys[0]
    wrapped.recipient_key_id = KemKey.generate().public.key_id


def _change_commitment(header: Header) -> None:
    header.sealed.header = flip(header.sealed.header, 10)


def _lengthen_header(header: Header) -> None:
    header.sealed.header += bytes(1000)


def _change_digest(header: Header) -> None:
    header.chunk_digests = flip(header.chunk_digests, 0)


@pytest.mark.parametrize(
    "change",
    [
        _drop_seal,
        _drop_key,
        _add_key,
        _change_key,
        _shorten_key,
        _wrap_for_another,
        _change_commitment,
        _lengthen_header,
        _change_digest,
    ],
)
def test_a_changed_header_is_not_believed(
    line: Relay, client: Client, session_id: str, change: Callable[[Header], None]
) -> None:
    def apply(message: messages.GetGlobalModelResponse) -> None:
        if message.HasField("header"):
            change(message.header)

    spoil(line, apply)

    refused(client, session_id)


def test_another_payload_sealed_by_somebody_else_is_not_believed(
    line: Relay, client: Client, session_id: str
) -> None:
    context = SealContext("qflare", Direction.MODEL, session_id, 0)
    sealer = PayloadSealer(context, 4 * LARGE)
    segments = list(sealer.seal([bytes(4 * LARGE)]))
    recipient = client._login.identity.keys.kem.public

    def apply(message: messages.GetGlobalModelResponse) -> None:
        if message.HasField("header"):
            message.header.sealed.header = sealer.key.header
            message.header.sealed.wrapped_keys[0].CopyFrom(sealer.key.wrap(recipient))
        message.chunk.data = segments[message.chunk.index]

    spoil(line, apply)

    refused(client, session_id)
