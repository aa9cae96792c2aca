"""Data for ghz: what each call sends, in files and variables of the environment.

See README.md for the two forms. Every update is signed by the device that sends it, and every handshake is begun, so
that each call does its whole work in the coordinator; each can be sent once.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1.coordinator_service_pb2_grpc import CoordinatorServiceStub
from tests.bench.coordinator import Coordinator
from tests.bench.devices import Model, ask_task, signed, statement_of
from tests.bench.handshakes import Logins, enrollment, session_key
from tests.bench.population import BenchDevice
from tests.bench.small_operations import start_unbounded

TOKEN_COUNT = 64
CALL = ".RequestNumber"


@dataclass(frozen=True)
class Prepared:
    """What one run of ghz needs beside its configuration: how many calls, and the environment."""

    total: int
    environment: Mapping[str, str] = field(default_factory=dict)


def _write(folder: Path, name: str, data: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(data))


def _json(message: Message) -> Any:
    return json_format.MessageToDict(message)


def register(coordinator: Coordinator, folder: Path, total: int) -> Prepared:
    """Begin enrollments; the calls end them."""
    requests = []
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = CoordinatorServiceStub(channel)
        server_key = session_key(coordinator, stub)
        for token in coordinator.population.enrollment_tokens(total):
            one = enrollment(coordinator.config.realm, token, server_key)
            begin = pb.BeginRegistrationRequest(enrollment=one.request())
            challenge = stub.BeginRegistration(begin).challenge
            requests.append(_json(pb.RegisterRequest(confirmation=one.confirm(challenge))))
    _write(folder, "register", requests)
    return Prepared(total)


def authenticate(coordinator: Coordinator, folder: Path, total: int) -> Prepared:
    """Begin logins; the calls end them."""
    logins = Logins(coordinator, coordinator.population.devices(total))
    proofs = [
        pb.AuthenticateRequest.FromString(call.messages[0]) for call in logins.second_halves()
    ]
    logins.close()
    _write(folder, "authenticate", [_json(proof) for proof in proofs])
    return Prepared(total)


def get_task(coordinator: Coordinator, folder: Path, total: int) -> Prepared:
    """Ask for work that there is not."""
    _write(folder, "get-task", {})
    return Prepared(total, _tokens(coordinator.population.devices(TOKEN_COUNT)))


def submit_10_kb(coordinator: Coordinator, folder: Path, total: int) -> Prepared:
    """Upload small updates: header and bytes in one message."""
    return _submit(coordinator, folder, "submit-10kb", Model(10_000), total)


def submit_1_mb(coordinator: Coordinator, folder: Path, total: int) -> Prepared:
    """Upload updates of one chunk: the header, then the chunk."""
    return _submit(coordinator, folder, "submit-1mb", Model(1_000_000), total)


def _submit(
    coordinator: Coordinator, folder: Path, name: str, model: Model, total: int
) -> Prepared:
    session_id = start_unbounded(coordinator, model)
    devices = coordinator.population.devices(total)
    task = ask_task(coordinator, devices[0], session_id)
    environment = _tokens(devices)
    for number, device in enumerate(devices):
        statement = statement_of(coordinator.config.realm, task, device, model)
        envelope = signed(statement, device)
        signature = envelope.signatures[0]
        environment[f"PAYLOAD_{number}"] = base64.b64encode(envelope.payload).decode()
        environment[f"SIGNATURE_{number}"] = base64.b64encode(signature.signature).decode()
        environment[f"KEY_{number}"] = signature.key_id
    _write(folder, name, _upload_template(model))
    return Prepared(total, environment)


def _upload_template(model: Model) -> list[dict[str, Any]]:
    """Return the messages of one upload with gaps for what differs between calls."""
    signature = {
        "keyId": _variable("KEY"),
        "algorithm": "SIGNATURE_ALGORITHM_ML_DSA_65",
        "signature": _variable("SIGNATURE"),
    }
    statement = {"payload": _variable("PAYLOAD"), "signatures": [signature]}
    chunk = {"index": "0", "data": base64.b64encode(model.chunks[0]).decode()}
    if model.size_bytes < 100_000:
        return [{"header": {"statement": statement}, "chunk": chunk}]
    return [{"header": {"statement": statement}}, {"chunk": chunk}]


def _variable(name: str) -> str:
    return f"{{{{env (printf `{name}_%d` {CALL})}}}}"


def _tokens(devices: Sequence[BenchDevice]) -> dict[str, str]:
    return {f"TOKEN_{number}": device.token for number, device in enumerate(devices)}


def get_model(coordinator: Coordinator, folder: Path, total: int) -> Prepared:
    """Download a model of 1 MB."""
    session_id = start_unbounded(coordinator, Model(1_000_000))
    _write(folder, "get-model", {"trainingSessionId": session_id})
    return Prepared(total, _tokens(coordinator.population.devices(TOKEN_COUNT)))


def list_devices(coordinator: Coordinator, folder: Path, total: int) -> Prepared:
    """List the first fifty devices."""
    _write(folder, "list-devices", {})
    return Prepared(total, {"ADMIN_TOKEN": coordinator.admin.token})


def list_audit(coordinator: Coordinator, folder: Path, total: int) -> Prepared:
    """List the latest fifty audit entries."""
    _write(folder, "list-audit", {})
    return Prepared(total, {"ADMIN_TOKEN": coordinator.admin.token})
