"""Vectors of signed documents: trust, statements, versions with their evidence, heads of the log."""

import json
from datetime import timedelta
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto import merkle
from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import Algorithm, SigningContext, SigningKey
from qflare.evidence.checkpoints import checkpoint_line
from qflare.evidence.lineage import contribution_proof, contributors_digest, sign_model
from qflare.evidence.statements import (
    digest_of,
    sign_evaluation,
    sign_rotation,
    sign_task,
    sign_update,
)
from qflare.v1 import security_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client.trust.evidence import Evidence, UpdateEvidence
from qflare_server.keys.trust_documents import Trust, draft_keyset, draft_root, sign_document
from tests.vectors.protocol.generate import AT, REALM, kem_key, seed, signing_key

SESSION_ID: Final = "00000000-0000-4000-8000-00000000a000"
ROLES: Final = {
    pb.KEY_ROLE_MODEL: "model",
    pb.KEY_ROLE_REGISTRAR: "registrar",
    pb.KEY_ROLE_LOG: "log",
    pb.KEY_ROLE_TASK: "task",
}
NONCE: Final = seed("task nonce").hex()


def moment(seconds: int = 0) -> Timestamp:
    """A time so many seconds after the beginning."""
    message = Timestamp()
    message.FromDatetime(AT + timedelta(seconds=seconds))
    return message


def device_id(number: int) -> str:
    """The id of a device."""
    return f"00000000-0000-4000-8000-{number:012x}"


def device_key(number: int) -> SigningKey:
    """The signature key of a device."""
    return signing_key(f"device {number}")


def trust_documents() -> Trust:
    """Two root documents, the second with another key, and a keyset."""
    first, second = (signing_key(f"root {n}", Algorithm.ML_DSA_87) for n in (1, 2))
    roots = [
        sign_document(draft_root(REALM, 1, [first.public], 1, AT), [first]),
        sign_document(draft_root(REALM, 2, [second.public], 1, AT), [first, second]),
    ]
    kem = pb.RoleKey(role=pb.KEY_ROLE_SESSION_KEM, kem_key=kem_key("session").public.to_proto())
    keys = [
        pb.RoleKey(role=role, signature_key=signing_key(label).public.to_proto())
        for role, label in ROLES.items()
    ]
    keyset = draft_keyset(REALM, 3, 2, [kem, *keys], AT)
    return Trust.follow(REALM, roots, sign_document(keyset, [second]))


def trust() -> dict[str, Any]:
    """Section 3."""
    documents = trust_documents()
    return {
        "realm": REALM,
        "pinned_root_key_ids": documents.root_key_ids(),
        "threshold": 1,
        "at": AT.isoformat(),
        "bundle": documents.bundle().SerializeToString().hex(),
        "keyset_version": documents.keyset.version,
        "session_kem_seed": seed("session").hex(),
        "signing_seeds": {label: seed(label).hex() for label in ROLES.values()},
    }


def update_statement(number: int, round_number: int, base_digest: str) -> pb.UpdateStatement:
    """The statement of a device's update."""
    return pb.UpdateStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        round_number=round_number,
        task_nonce=NONCE,
        update_id=f"00000000-0000-4000-9000-{round_number:06x}{number:06x}",
        device_id=device_id(number),
        key_id=device_key(number).public.key_id,
        base_version=round_number - 1,
        base_digest=base_digest,
        layout_digest=seed("layout").hex(),
        size_bytes=24,
        payload_digest=seed(f"payload {number}").hex(),
        wire_digest=seed(f"payload {number}").hex(),
        kind=training_pb2.UPDATE_KIND_WEIGHTS,
        encoding=training_pb2.ENCODING_NONE,
        example_count=100 * number,
        metrics={"accuracy": 0.75, "loss": 0.5},
        create_time=moment(round_number),
    )


def _versions() -> tuple[list[pb.SignedEnvelope], list[UpdateEvidence]]:
    """Version 0, two rounds of two devices, and a rollback to version 1."""
    envelopes = [_version(0, "")]
    evidence: list[UpdateEvidence] = []
    for number in (1, 2):
        base = digest_of(envelopes[-1].payload)
        updates = [
            sign_update(device_key(device), update_statement(device, number, base))
            for device in (1, 2)
        ]
        digests = [digest_of(update.payload) for update in updates]
        envelopes.append(_version(number, base, digests))
        evidence += [
            UpdateEvidence(
                statement=update,
                public_key=device_key(device).public.to_proto(),
                version=number,
                proof=contribution_proof(digests, digest_of(update.payload)),
                enrollment_receipt=_receipt(device),
            )
            for device, update in enumerate(updates, 1)
        ]
    envelopes.append(_version(3, digest_of(envelopes[-1].payload), rollback_version=1))
    return envelopes, evidence


def _version(
    version: int,
    parent: str,
    contributors: list[str] | None = None,
    rollback_version: int | None = None,
) -> pb.SignedEnvelope:
    content = version if rollback_version is None else rollback_version
    statement = pb.ModelStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        version=version,
        parent_digest=parent,
        base_version=version - 1 if rollback_version is None else rollback_version,
        round_number=version if contributors else 0,
        layout_digest=seed("layout").hex(),
        size_bytes=24,
        payload_digest=seed(f"content {content}").hex(),
        strategy_name="fedavg" if contributors else ("rollback" if version else "initial"),
        config_digest=seed("config").hex(),
        code_version="0",
        contributor_count=len(contributors or ()),
        contributors_digest=contributors_digest(contributors or ()),
        weight_sum=300.0 if contributors else 0.0,
        example_count=300 if contributors else 0,
        create_time=moment(version),
        rollback_version=rollback_version,
    )
    return sign_model(signing_key("model"), statement)


def _receipt(number: int) -> pb.SignedEnvelope:
    receipt = pb.EnrollmentReceipt(
        realm=REALM,
        device_id=device_id(number),
        signature_key_id=device_key(number).public.key_id,
        kem_key_id=kem_key(f"device {number}").public.key_id,
        keyset_version=3,
        register_time=moment(),
        request_nonce=seed(f"request {number}"),
    )
    return sign_envelope(signing_key("registrar"), SigningContext.RECEIPT, receipt)


def evidence() -> dict[str, Any]:
    """Sections 3, 9, 10 and 13: a whole file of evidence."""
    documents = trust_documents()
    statements, updates = _versions()
    file = Evidence(
        realm=REALM,
        training_session_id=SESSION_ID,
        keyset=documents.bundle(),
        statements=statements,
        updates=updates,
    )
    return {
        "pinned_root_key_ids": documents.root_key_ids(),
        "threshold": 1,
        "at": AT.isoformat(),
        "digests": [digest_of(envelope.payload) for envelope in statements],
        "evidence": json.loads(file.to_json()),
    }


def statements() -> dict[str, Any]:
    """Sections 6, 7 and 9: a task, an update for it, an evaluation, and a rotation of keys."""
    base_digest = seed("base").hex()
    task = pb.TaskStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        round_number=1,
        base_version=0,
        base_digest=base_digest,
        task_nonce=NONCE,
        deadline_time=moment(600),
        config_digest=seed("config").hex(),
    )
    following = signing_key("device 1 next")
    rotation = pb.KeyRotation(
        realm=REALM,
        device_id=device_id(1),
        sequence_number=1,
        previous_key_id=device_key(1).public.key_id,
        signature_key=following.public.to_proto(),
        kem_key=kem_key("device 1 next").public.to_proto(),
        create_time=moment(60),
    )
    update = sign_update(device_key(1), update_statement(1, 1, base_digest))
    evaluation = pb.EvaluationStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        version=1,
        version_digest=seed("version").hex(),
        evaluation_nonce=seed("evaluation nonce").hex(),
        device_id=device_id(1),
        key_id=device_key(1).public.key_id,
        example_count=50,
        metrics={"accuracy": 0.625, "loss": 0.75},
        create_time=moment(120),
    )
    signed = {
        "evaluation": sign_evaluation(device_key(1), evaluation),
        "task": sign_task(signing_key("task"), task),
        "update": update,
        "rotation": sign_rotation(device_key(1), following, rotation),
    }
    return {
        "task_key": signing_key("task").public.to_proto().SerializeToString().hex(),
        "device_key": device_key(1).public.to_proto().SerializeToString().hex(),
        "device_signing_seed": seed("device 1").hex(),
        **{name: envelope.SerializeToString().hex() for name, envelope in signed.items()},
        "update_statement": json_format.MessageToDict(
            pb.UpdateStatement.FromString(update.payload)
        ),
        "update_digest": digest_of(update.payload),
        "evaluation_statement": json_format.MessageToDict(evaluation),
    }


def audit_heads() -> dict[str, Any]:
    """Section 11: two heads of a log, the proof between them, and the second as a line."""
    leaves = [merkle.leaf_hash(bytes([number])) for number in range(7)]
    nodes = merkle.consistency_proof(merkle.nodes_of(leaves), 4, 7)
    proof = pb.ConsistencyProof(
        first_size=4, second_size=7, node_digests=[part.hex() for part in nodes]
    )
    heads = [
        sign_envelope(
            signing_key("log"),
            SigningContext.TREE_HEAD,
            pb.TreeHead(
                origin=f"{REALM}/audit",
                size=size,
                root_digest=merkle.root(leaves[:size]).hex(),
                create_time=moment(size),
            ),
        )
        for size in (4, 7)
    ]
    return {
        "log_key": signing_key("log").public.to_proto().SerializeToString().hex(),
        "origin": f"{REALM}/audit",
        "heads": [head.SerializeToString().hex() for head in heads],
        "consistency": proof.SerializeToString().hex(),
        "checkpoint_line": checkpoint_line(heads[1]),
    }


FILES: Final = {
    "trust.json": trust,
    "evidence.json": evidence,
    "statements.json": statements,
    "audit_heads.json": audit_heads,
}
