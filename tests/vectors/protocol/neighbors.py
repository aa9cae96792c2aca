"""Vectors of secure aggregation with neighbors: graphs and their parameters, and one group with all that it sends."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from qflare.crypto import merkle
from qflare.crypto.signing import tagged_hash
from qflare.evidence.lineage import contributors_digest, sign_model
from qflare.evidence.neighbors import (
    MaskedRound,
    boxes_tree,
    open_advertisement,
    sharers_digest,
    sign_neighbor_statement,
    survivors_digest,
)
from qflare.evidence.statements import digest_of, sign_task, sign_update
from qflare.evidence.unmasking import NeighborPolicy
from qflare.masking.graph_parameters import group_parameters
from qflare.masking.neighbor_graph import NeighborGraph
from qflare.masking.neighbors import MemberSecrets, OpenedBox
from qflare.masking.parameters import MaskingParameters
from qflare.masking.quantization import Quantizer, quantize_slots
from qflare.v1 import coordinator_service_pb2, training_pb2, verification_pb2
from qflare.v1 import security_pb2 as pb
from qflare_server.storage.repository.neighbors import StoredMember
from qflare_server.training.neighbor_opening import GroupContents, open_group
from tests.vectors.protocol.documents import (
    NONCE,
    SESSION_ID,
    device_id,
    device_key,
    moment,
    update_statement,
)
from tests.vectors.protocol.generate import REALM, seed, signing_key

BASE_DIGEST: Final = seed("base").hex()
COUNT: Final = 7
DROPPED: Final = (7, 2)
"""Of the group's devices, one that drops out after it has sent shares, and one before."""
RECORDED: Final = (1, 7)
"""Devices whose boxes are recorded, one in the sum and one that drops out."""
FRACTIONS: Final = (0.2, 0.1)
SIZES: Final = (
    *((3, 0.0, 0.0), (7, 0.2, 0.1), (32, 0.3, 0.3), (33, 0.1, 0.1), (60, 0.2, 0.1)),
    *((100, 0.2, 0.1), (100, 0.1, 0.3), (100, 0.0, 0.1), (250, 0.1, 0.1), (1000, 0.2, 0.1)),
)


def graphs() -> list[dict[str, Any]]:
    """Parameters, and the neighbors of one member."""
    made = []
    for size, corrupt, dropout in SIZES:
        found = group_parameters(size, corrupt, dropout)
        roster = sorted(
            tagged_hash("test vector", bytes([n % 256, n >> 8])).hex() for n in range(size)
        )
        graph = NeighborGraph(roster, found)
        near = [roster.index(item) for item in graph.neighbors(roster[0])]
        made.append(
            {
                "size": size,
                "corrupt_fraction": corrupt,
                "dropout_fraction": dropout,
                "neighbor_count": found.neighbor_count,
                "threshold": found.threshold,
                "max_dropouts": found.max_dropouts,
                "roster_digest": graph.roster_digest,
                "neighbors_of_first": near,
            }
        )
    return made


def task() -> pb.SignedEnvelope:
    """A signed task with neighbors."""
    policy = training_pb2.SecureAggregationPolicy(
        mode=training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS,
        bits=32,
        clip=4.0,
        max_cohort=10,
        min_cohort=3,
        corrupt_fraction=FRACTIONS[0],
        dropout_fraction=FRACTIONS[1],
        metrics=[training_pb2.MaskedMetric(name="loss", bound=20.0)],
    )
    transfer = training_pb2.TransferPolicy(
        update_encoding=training_pb2.ENCODING_MASKED, update_kind=training_pb2.UPDATE_KIND_DELTA
    )
    statement = pb.TaskStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        round_number=1,
        base_version=0,
        base_digest=BASE_DIGEST,
        task_nonce=NONCE,
        deadline_time=moment(600),
        config_digest=seed("config").hex(),
        transfer=transfer,
        masking=pb.MaskingTask(policy=policy, max_weight=1000),
    )
    return sign_task(signing_key("task"), statement)


class Device:
    """A device of the group."""

    def __init__(self, number: int, masked_round: MaskedRound) -> None:
        self.number = number
        self.key = device_key(number)
        self.masked_round = masked_round
        label = f"neighbor {number}"
        self.seeds = [seed(f"{label} {kind}") for kind in ("mask", "self", "channel")]
        self.secrets = MemberSecrets(*self.seeds)
        advertisement = pb.NeighborAdvertisement(
            channel_key=self.secrets.channel_key.public.to_proto(),
            mask_key=self.secrets.mask_key.public.to_proto(),
            self_seed_digest=self.secrets.self_seed_digest,
            nonce=seed(f"{label} nonce"),
        )
        self.advertisement = self.sign(advertisement)
        self.member = open_advertisement(self.advertisement, self.key.public, masked_round)
        self.digest = self.member.digest
        self.change = np.linspace(-1.0, 1.0, 6) * number
        self.weight = 100 * number
        self.shares = coordinator_service_pb2.SharedSecrets()
        self.opened: dict[str, OpenedBox] = {}
        self.payload = b""
        self.update: pb.SignedEnvelope | None = None
        self.confirmation: pb.SignedEnvelope | None = None
        self.reveal: pb.SignedEnvelope | None = None

    def sign(self, statement: Any) -> pb.SignedEnvelope:
        """Sign a statement of a step."""
        self.masked_round.fill(statement, device_id(self.number), self.key.public.key_id)
        statement.create_time.CopyFrom(moment())
        return sign_neighbor_statement(self.key, statement)

    def share(self, graph: NeighborGraph, devices: Mapping[str, "Device"]) -> None:
        """Make shares for the neighbors."""
        keys = {digest: other.member.keys for digest, other in devices.items()}
        boxes = self.secrets.make_boxes(graph, self.digest, keys)
        statement = pb.NeighborShares(
            advertisement_digest=self.digest,
            roster_digest=graph.roster_digest,
            boxes_digest=merkle.root(boxes_tree(boxes)).hex(),
        )
        self.shares = coordinator_service_pb2.SharedSecrets(
            statement=self.sign(statement), boxes=boxes
        )

    def upload(self, graph: NeighborGraph, task_digest: str, sharers: str) -> None:
        """Mask an update."""
        made = MaskingParameters(32, 4.0, 10, 1000, {"loss": 20.0})
        norm = float(np.linalg.norm(self.change))
        quantized = Quantizer(made, self.weight, norm).quantize(self.change)
        slots = quantize_slots(made, self.weight, {"loss": 0.5 * self.number})
        vector = np.concatenate([quantized, slots])
        self.secrets.mask(vector, graph, self.digest, self.opened)
        self.payload = vector.tobytes()
        statement = update_statement(self.number, 1, BASE_DIGEST)
        statement.ClearField("metrics")
        statement.example_count, statement.size_bytes = 1, len(self.payload)
        statement.kind = training_pb2.UPDATE_KIND_DELTA
        statement.encoding = training_pb2.ENCODING_MASKED
        digest = merkle.leaf_hash(self.payload).hex()
        statement.payload_digest = statement.wire_digest = digest
        statement.masking.task_digest = task_digest
        statement.masking.neighbors.advertisement_digest = self.digest
        statement.masking.neighbors.roster_digest = graph.roster_digest
        statement.masking.neighbors.sharers_digest = sharers
        self.update = sign_update(self.key, statement)

    def vector(self) -> dict[str, Any]:
        """What is recorded of the device."""
        sent = {"update": self.update, "reveal": self.reveal}
        boxes = [item.SerializeToString().hex() for item in self.shares.boxes]
        return {
            "device_id": device_id(self.number),
            "device_key": self.key.public.to_proto().SerializeToString().hex(),
            **dict(zip(("mask_seed", "self_seed", "channel_seed"), _hex(self.seeds), strict=True)),
            "change": self.change.tolist(),
            "weight": self.weight,
            "loss": 0.5 * self.number,
            "payload": self.payload.hex(),
            **{name: item.payload.hex() if item else "" for name, item in sent.items()},
            "boxes": boxes if self.number in RECORDED else [],
        }


def _hex(items: list[bytes]) -> list[str]:
    return [item.hex() for item in items]


def group() -> dict[str, Any]:
    """Section 19: a group of which two devices drop out, its transcript, and the statement of the version."""
    signed_task = task()
    task_digest = digest_of(signed_task.payload)
    masked_round = MaskedRound(REALM, SESSION_ID, 1, task_digest)
    made = [Device(number, masked_round) for number in range(1, COUNT + 1)]
    devices = {device.digest: device for device in sorted(made, key=lambda item: item.digest)}
    graph = NeighborPolicy(*FRACTIONS).graph(list(devices))
    sharing = [device for device in devices.values() if device.number != DROPPED[1]]
    for device in sharing:
        device.share(graph, devices)
    for device in sharing:
        for other in sharing:
            for box in other.shares.boxes:
                if box.recipient_digest == device.digest:
                    secrets = device.secrets
                    device.opened[other.digest] = secrets.open_box(
                        graph, device.digest, other.digest, box
                    )
    named = {device.digest: digest_of(device.shares.statement.payload) for device in sharing}
    sharers = sharers_digest(graph, named)
    training = [device for device in sharing if device.number not in DROPPED]
    for device in training:
        device.upload(graph, task_digest, sharers)
    updates = {item.digest: digest_of(item.update.payload) for item in training if item.update}
    survivors = survivors_digest(graph, sharers, updates)
    for device in training:
        _finish(device, graph, sharers, survivors, updates)
    transcript = _transcript(graph, devices, named, updates)
    version = _version(task_digest, updates, transcript)
    unmasking = verification_pb2.UnmaskingTranscript(
        task=signed_task,
        groups=[verification_pb2.NeighborTranscriptPart(content=transcript)],
    )
    return {
        "task_key": signing_key("task").public.to_proto().SerializeToString().hex(),
        "model_key": signing_key("model").public.to_proto().SerializeToString().hex(),
        "transcript": unmasking.SerializeToString().hex(),
        "version": version.SerializeToString().hex(),
        "devices": [device.vector() for device in devices.values()],
    }


def _finish(
    device: Device,
    graph: NeighborGraph,
    sharers: str,
    survivors: str,
    updates: Mapping[str, str],
) -> None:
    names: dict[str, Any] = {
        "advertisement_digest": device.digest,
        "roster_digest": graph.roster_digest,
    }
    device.confirmation = device.sign(
        pb.NeighborConfirmation(**names, sharers_digest=sharers, survivors_digest=survivors)
    )
    reveal = pb.NeighborReveal(**names, survivors_digest=survivors)
    for owner, box in sorted(device.opened.items()):
        share = box.shares.own if owner in updates else box.shares.mask
        reveal.shares.add(owner_digest=owner, share=share)
    device.reveal = device.sign(reveal)


def _transcript(
    graph: NeighborGraph,
    devices: Mapping[str, Device],
    named: Mapping[str, str],
    updates: Mapping[str, str],
) -> bytes:
    members = [
        StoredMember(
            device_id(device.number),
            digest,
            1,
            digest in named,
            updates.get(digest),
            named.get(digest),
            digest in updates,
            digest in updates,
            is_active=True,
        )
        for digest, device in devices.items()
    ]
    contents = GroupContents(
        graph,
        members,
        {digest: device.advertisement for digest, device in devices.items()},
        {digest: device.shares for digest, device in devices.items() if digest in named},
        {digest: item.confirmation for digest, item in devices.items() if item.confirmation},
        {
            digest: pb.NeighborReveal.FromString(item.reveal.payload)
            for digest, item in devices.items()
            if item.reveal
        },
    )
    return open_group(contents).serialized()


def _version(task_digest: str, updates: Mapping[str, str], transcript: bytes) -> pb.SignedEnvelope:
    statement = pb.ModelStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        version=1,
        parent_digest=BASE_DIGEST,
        base_version=0,
        round_number=1,
        layout_digest=seed("layout").hex(),
        size_bytes=24,
        payload_digest=seed("content 1").hex(),
        strategy_name="fedavg",
        config_digest=seed("config").hex(),
        code_version="0",
        contributor_count=len(updates),
        contributors_digest=contributors_digest(updates.values()),
        weight_sum=1.0,
        example_count=1,
        create_time=moment(1),
        unmasking=pb.ModelUnmasking(
            task_digest=task_digest, answer_digests=[digest_of(transcript)]
        ),
    )
    return sign_model(signing_key("model"), statement)


def neighbors() -> dict[str, Any]:
    """All of section 19."""
    return {"graphs": graphs(), "group": group()}


FILES: Final = {"neighbors.json": neighbors}
