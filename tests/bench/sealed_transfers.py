"""Updates of 100 MB that are sealed for the coordinator: what opening them costs an upload."""

import hashlib
from collections.abc import Iterator

import grpc

from qflare.crypto.sealed_payloads import PayloadSealer, SealContext
from qflare.crypto.sealing import KemPublicKey
from qflare.tensors import PayloadHasher
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2, training_pb2
from qflare.v1.coordinator_service_pb2_grpc import CoordinatorServiceStub
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.devices import SUBMIT, Model, ask_task, signed, statement_of, submissions
from tests.bench.figures import Figure, percent, throughput
from tests.bench.handshakes import session_key
from tests.bench.load import Call
from tests.bench.population import BenchDevice
from tests.bench.small_operations import UNBOUNDED, start_unbounded
from tests.bench.transfers import LARGE_BYTES, in_turns

SHARE_GOAL = 0.7


def sealed_uploads(lab: Laboratory) -> Iterator[Figure]:
    """What sealing costs a signed upload of 100 MB: every segment is hashed, opened, checked and hashed again."""
    model, repeats = Model(LARGE_BYTES), lab.times(5, 2)
    for backend in Backend:
        with lab.coordinator(backend) as sealing, lab.coordinator(backend) as plain:
            calls = (_sealed(sealing, model, repeats), _plain(plain, model, repeats))
            sealed_s, plain_s = in_turns((sealing.process, plain.process), calls)
        share = plain_s / sealed_s
        yield Figure(
            f"submit 100 MB sealed, {backend}",
            throughput(LARGE_BYTES, sealed_s),
            f"signed, not sealed: {throughput(LARGE_BYTES, plain_s)}",
            percent(share),
            f">= {percent(SHARE_GOAL)}",
            share >= SHARE_GOAL,
        )


def _plain(coordinator: Coordinator, model: Model, count: int) -> list[Call]:
    session_id = start_unbounded(coordinator, model)
    return submissions(coordinator, session_id, coordinator.population.devices(count), model)


def _sealed(coordinator: Coordinator, model: Model, count: int) -> list[Call]:
    config = training_pb2.TrainingConfig(
        rounds=training_pb2.RoundPolicy(quorum=UNBOUNDED),
        transfer=training_pb2.TransferPolicy(sealed=True),
    )
    session_id = coordinator.admin.start_session(model.manifest, model.payload, config)
    devices = coordinator.population.devices(count)
    task = ask_task(coordinator, devices[0], session_id)
    with grpc.insecure_channel(coordinator.address) as channel:
        key = session_key(coordinator, CoordinatorServiceStub(channel))
    realm = coordinator.config.realm
    return [
        _submission(statement_of(realm, task, device, model), device, model, key)
        for device in devices
    ]


def _submission(
    statement: security_pb2.UpdateStatement,
    device: BenchDevice,
    model: Model,
    recipient: KemPublicKey,
) -> Call:
    """Return the upload of a sealed update."""
    sealer = PayloadSealer(SealContext.from_update(statement), model.size_bytes)
    segments = list(sealer.seal(model.chunks))
    hasher = PayloadHasher()
    for segment in segments:
        hasher.add(segment)
    statement.sealed = True
    statement.wire_digest = hasher.root()
    statement.sealed_header_digest = hashlib.sha256(sealer.key.header).hexdigest()
    header = pb.UpdateHeader(
        statement=signed(statement, device),
        chunk_digests=b"".join(hasher.leaf_hashes),
        sealed=security_pb2.SealedPayloadHeader(
            header=sealer.key.header, wrapped_keys=[sealer.key.wrap(recipient)]
        ),
    )
    messages = [pb.SubmitUpdateRequest(header=header).SerializeToString()]
    for index, segment in enumerate(segments):
        chunk = pb.Chunk(index=index, data=segment)
        messages.append(pb.SubmitUpdateRequest(chunk=chunk).SerializeToString())
    return Call(SUBMIT, tuple(messages), device.token)
