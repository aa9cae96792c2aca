"""The recorded vectors of the wire protocol: the product accepts them, and so does the independent verifier."""

import copy
import inspect
import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from qflare.crypto import envelope as envelopes
from qflare.crypto.signing import InvalidSignatureError, PublicKey, SigningContext
from qflare.evidence.checkpoints import checkpoint_line, parse_checkpoint_line
from qflare.evidence.statements import (
    check_growth,
    open_evaluation,
    open_rotation,
    open_task,
    open_tree_head,
    open_update,
)
from qflare.protocol.keysets import ExpiredKeysetError, KeyRole, TrustedKeyset
from qflare.v1 import security_pb2 as pb
from qflare.v1 import tensor_pb2
from qflare_client.errors import InvalidEvidenceError
from qflare_client.trust.evidence import Evidence, verify
from qflare_server import errors
from qflare_server.config import ServerConfig
from qflare_server.serving.rpc import status
from tests.independent import exchange, verifier
from tests.independent.verifier import RefusedError
from tests.vectors.protocol import documents, generate

FOLDER = Path(generate.__file__).parent
DOCUMENTS = FOLDER.parents[2] / "docs"
PAGE = (DOCUMENTS / "protocol.md").read_text(encoding="utf-8")
SIZES = {1: (1312, 2420), 2: (1952, 3309), 3: (2592, 4627), 4: (1984, 3373)}


def load(name: str) -> dict[str, Any]:
    """Return a file of vectors."""
    vectors: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return vectors


HASHES, ENCODINGS, SIGNATURES = load("hashes"), load("encodings"), load("signatures")
TRUST, EVIDENCE, STATEMENTS = load("trust"), load("evidence"), load("statements")
AUDIT = load("audit_heads")


def data(vector: dict[str, Any], name: str) -> bytes:
    """Return bytes that a vector holds in hex."""
    return bytes.fromhex(vector[name])


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading of the page."""
    section = PAGE.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    table = section[section.index("\n|") + 1 :].split("\n\n", 1)[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_reason_with_its_status() -> None:
    listed = [(reason.strip("`"), status.strip("`")) for reason, status, _when in rows("14. ")]
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    wanted = {
        (kind.reason, status.status_of(kind.__new__(kind)).name)
        for kind in kinds
        if issubclass(kind, errors.QflareError)
    }
    assert sorted(listed) == sorted(wanted)


def test_the_page_names_every_signing_context() -> None:
    named = {cells[0].strip("`") for cells in rows("1. ")}
    assert named == {str(context) for context in SigningContext} - {str(SigningContext.SELF_TEST)}


@pytest.mark.parametrize("name", ["protocol.md", "security.md"])
def test_settings_that_a_page_names_exist(name: str) -> None:
    named = re.findall(r"QFLARE_([A-Z_]+)", (DOCUMENTS / name).read_text(encoding="utf-8"))
    assert {setting.lower() for setting in named} <= ServerConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", ["protocol.md", "security.md"])
def test_links_of_a_page_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (DOCUMENTS / name).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (DOCUMENTS / link).exists()] == []


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_code_of_the_page_runs(block: str) -> None:
    exec(compile(block, "protocol.md", "exec"), {})


@pytest.mark.parametrize(
    ("vectors", "make"), [(HASHES, generate.hashes), (ENCODINGS, generate.encodings)]
)
def test_what_is_not_random_comes_out_the_same(
    vectors: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> None:
    assert json.loads(json.dumps(make())) == vectors


@pytest.mark.parametrize("vector", HASHES["tagged_hash"])
def test_tagged_hash(vector: dict[str, Any]) -> None:
    parts = [bytes.fromhex(part) for part in vector["parts"]]
    assert verifier.tagged_hash(vector["tag"], *parts).hex() == vector["digest"]


@pytest.mark.parametrize("vector", [*HASHES["layout"], ENCODINGS["base"], *ENCODINGS["cases"]])
def test_layout_digest(vector: dict[str, Any]) -> None:
    manifest = tensor_pb2.Manifest(
        tensors=[tensor_pb2.TensorSpec(**tensor) for tensor in vector["tensors"]]
    )
    assert verifier.layout_digest(manifest) == vector["layout_digest"]


@pytest.mark.parametrize("vector", HASHES["payload"])
def test_payload_digest(vector: dict[str, Any]) -> None:
    payload = generate.pattern(vector["size_bytes"])
    assert verifier.payload_digest(payload) == vector["payload_digest"]


@pytest.mark.parametrize("vector", HASHES["inclusion"])
def test_inclusion_proof(vector: dict[str, Any]) -> None:
    proof = pb.InclusionProof(
        leaf_index=vector["leaf_index"],
        tree_size=vector["tree_size"],
        sibling_digests=vector["sibling_digests"],
    )
    verifier.check_inclusion(data(vector, "leaf"), proof, data(vector, "root"))


@pytest.mark.parametrize("vector", HASHES["consistency"])
def test_consistency_proof(vector: dict[str, Any]) -> None:
    proof = pb.ConsistencyProof(
        first_size=vector["first_size"],
        second_size=vector["second_size"],
        node_digests=vector["node_digests"],
    )
    roots = data(vector, "first_root"), data(vector, "second_root")
    verifier.check_consistency(*roots, proof)
    with pytest.raises(RefusedError):
        verifier.check_consistency(roots[0], bytes(32), proof)


def test_contributors() -> None:
    vector = HASHES["contributors"]
    payloads = [bytes.fromhex(payload) for payload in vector["payloads"]]
    assert verifier.contributors_digest(payloads) == vector["contributors_digest"]


@pytest.mark.parametrize("vector", HASHES["audit_entries"])
def test_audit_entry(vector: dict[str, Any]) -> None:
    found = exchange.audit_leaf(vector, data(vector, "salt"))
    assert found == verifier.leaf(data(vector, "entry")) == data(vector, "leaf")


def _signed(vector: dict[str, Any]) -> tuple[pb.PublicKey, pb.SignedEnvelope]:
    key = pb.PublicKey(
        key_id=vector["key_id"], algorithm=vector["algorithm"], data=data(vector, "public_key")
    )
    return key, pb.SignedEnvelope.FromString(data(vector, "envelope"))


@pytest.mark.parametrize("vector", SIGNATURES["cases"])
def test_signature(vector: dict[str, Any]) -> None:
    key, envelope = _signed(vector)
    opened = envelopes.open_envelope(
        envelope, SigningContext(vector["context"]), [PublicKey.from_proto(key)]
    )
    assert opened == verifier.open_envelope(envelope, vector["context"], {key.key_id: key})
    assert (len(key.data), len(envelope.signatures[0].signature)) == SIZES[key.algorithm]


@pytest.mark.parametrize("vector", SIGNATURES["cases"])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_flipped_bit_of_a_signature_is_refused(vector: dict[str, Any], place: int) -> None:
    key, envelope = _signed(vector)
    changed = bytearray(envelope.signatures[0].signature)
    changed[place] ^= 1
    envelope.signatures[0].signature = bytes(changed)
    with pytest.raises(InvalidSignatureError):
        envelopes.open_envelope(envelope, SigningContext.TASK, [PublicKey.from_proto(key)])
    with pytest.raises(RefusedError):
        verifier.open_envelope(envelope, vector["context"], {key.key_id: key})


@pytest.mark.parametrize("vector", SIGNATURES["cases"])
def test_a_signature_of_another_context_is_refused(vector: dict[str, Any]) -> None:
    key, envelope = _signed(vector)
    with pytest.raises(InvalidSignatureError):
        envelopes.open_envelope(envelope, SigningContext.UPDATE, [PublicKey.from_proto(key)])
    with pytest.raises(RefusedError):
        verifier.open_envelope(envelope, "qflare/v1/update", {key.key_id: key})


@pytest.mark.parametrize("vector", SIGNATURES["cases"])
def test_the_public_key_follows_from_the_seed(vector: dict[str, Any]) -> None:
    label = f"signature {pb.SignatureAlgorithm.Name(vector['algorithm'])}"
    label = label.replace("SIGNATURE_ALGORITHM_", "")
    key = generate.signing_key(label, PublicKey.from_proto(_signed(vector)[0]).algorithm)
    assert key.public.data == data(vector, "public_key")


def _trusted(vector: dict[str, Any], at: datetime) -> TrustedKeyset:
    bootstrap = pb.BootstrapBundle(
        realm=vector["realm"],
        root_key_ids=vector["pinned_root_key_ids"],
        threshold=vector["threshold"],
    )
    bundle = pb.KeysetBundle.FromString(data(vector, "bundle"))
    return TrustedKeyset.bootstrap(bootstrap).updated(bundle, at)


def test_trust_documents() -> None:
    at = datetime.fromisoformat(TRUST["at"])
    trusted = _trusted(TRUST, at)
    bundle = pb.KeysetBundle.FromString(data(TRUST, "bundle"))
    roles = verifier.open_keyset(
        bundle, TRUST["realm"], TRUST["pinned_root_key_ids"], TRUST["threshold"], at
    )
    model_keys = trusted.signature_keys(KeyRole.MODEL, at)
    assert trusted.keyset_version == TRUST["keyset_version"]
    assert [key.key_id for key in model_keys] == list(roles[verifier.MODEL])


def test_expired_trust_documents_are_refused() -> None:
    at = datetime.fromisoformat(TRUST["at"]) + timedelta(days=401)
    with pytest.raises(ExpiredKeysetError):
        _trusted(TRUST, at)
    bundle = pb.KeysetBundle.FromString(data(TRUST, "bundle"))
    with pytest.raises(RefusedError):
        verifier.open_keyset(bundle, TRUST["realm"], TRUST["pinned_root_key_ids"], 1, at)


def _verify_both(document: dict[str, Any]) -> None:
    """Check evidence with the product and independently; raise if either refuses."""
    pins, at = EVIDENCE["pinned_root_key_ids"], datetime.fromisoformat(EVIDENCE["at"])
    file = Evidence.from_json(json.dumps(document))
    refusals: list[Exception] = []
    for check in (
        lambda: verify(file, root_key_ids=pins, threshold=1, reference_time=at),
        lambda: verifier.check_evidence(document, pins, 1, at),
    ):
        try:
            check()
        except (InvalidEvidenceError, RefusedError) as error:
            refusals.append(error)
    assert len(refusals) in {0, 2}, refusals
    if refusals:
        raise refusals[1]


def test_evidence() -> None:
    _verify_both(EVIDENCE["evidence"])
    chain = verifier.check_evidence(
        EVIDENCE["evidence"],
        EVIDENCE["pinned_root_key_ids"],
        EVIDENCE["threshold"],
        datetime.fromisoformat(EVIDENCE["at"]),
    )
    assert [digest for _, digest in chain] == EVIDENCE["digests"]


def _without_version(document: dict[str, Any]) -> None:
    del document["statements"][1]


def _swapped_versions(document: dict[str, Any]) -> None:
    document["statements"].reverse()


def _other_realm(document: dict[str, Any]) -> None:
    document["realm"] = "elsewhere"


def _other_session(document: dict[str, Any]) -> None:
    document["training_session_id"] = documents.device_id(9)


def _changed_statement(document: dict[str, Any]) -> None:
    envelope = json_format.ParseDict(document["statements"][2], pb.SignedEnvelope())
    statement = pb.ModelStatement.FromString(envelope.payload)
    statement.example_count += 1
    envelope.payload = statement.SerializeToString(deterministic=True)
    document["statements"][2] = json_format.MessageToDict(envelope)


def _changed_update(document: dict[str, Any]) -> None:
    envelope = json_format.ParseDict(document["updates"][0]["statement"], pb.SignedEnvelope())
    envelope.payload += b"\xa0\x06\x01"
    document["updates"][0]["statement"] = json_format.MessageToDict(envelope)


def _other_version(document: dict[str, Any]) -> None:
    document["updates"][0]["version"] = 2


def _other_proof(document: dict[str, Any]) -> None:
    first, second, *_ = document["updates"]
    first["proof"], second["proof"] = second["proof"], first["proof"]


def _other_key(document: dict[str, Any]) -> None:
    first, second, *_ = document["updates"]
    first["public_key"] = second["public_key"]


def _other_receipt(document: dict[str, Any]) -> None:
    first, second, *_ = document["updates"]
    first["enrollment_receipt"] = second["enrollment_receipt"]


def _without_root(document: dict[str, Any]) -> None:
    del document["keyset"]["roots"][0]


def _root_as_keyset(document: dict[str, Any]) -> None:
    document["keyset"]["keyset"] = document["keyset"]["roots"][1]


@pytest.mark.parametrize(
    "change",
    [
        _without_version,
        _swapped_versions,
        _other_realm,
        _other_session,
        _changed_statement,
        _changed_update,
        _other_version,
        _other_proof,
        _other_key,
        _other_receipt,
        _without_root,
        _root_as_keyset,
    ],
)
def test_changed_evidence_is_refused_by_both(change: Callable[[dict[str, Any]], None]) -> None:
    document = copy.deepcopy(EVIDENCE["evidence"])
    change(document)
    with pytest.raises(RefusedError):
        _verify_both(document)


def test_statements_of_a_round() -> None:
    task_key = pb.PublicKey.FromString(data(STATEMENTS, "task_key"))
    envelope = pb.SignedEnvelope.FromString(data(STATEMENTS, "task"))
    task = open_task(envelope, [PublicKey.from_proto(task_key)], generate.REALM)
    verifier.open_envelope(envelope, "qflare/v1/task", {task_key.key_id: task_key})

    device_key = pb.PublicKey.FromString(data(STATEMENTS, "device_key"))
    envelope = pb.SignedEnvelope.FromString(data(STATEMENTS, "update"))
    update = open_update(envelope, PublicKey.from_proto(device_key))
    assert update == verifier.open_update(envelope, device_key)
    assert json_format.MessageToDict(update) == STATEMENTS["update_statement"]
    assert (update.task_nonce, update.base_digest) == (task.task_nonce, task.base_digest)


def test_evaluation() -> None:
    device_key = pb.PublicKey.FromString(data(STATEMENTS, "device_key"))
    envelope = pb.SignedEnvelope.FromString(data(STATEMENTS, "evaluation"))
    evaluation = open_evaluation(envelope, PublicKey.from_proto(device_key))
    assert evaluation == verifier.open_evaluation(envelope, device_key)
    assert json_format.MessageToDict(evaluation) == STATEMENTS["evaluation_statement"]


def test_rotation() -> None:
    key = PublicKey.from_proto(pb.PublicKey.FromString(data(STATEMENTS, "device_key")))
    rotation = open_rotation(
        pb.SignedEnvelope.FromString(data(STATEMENTS, "rotation")),
        key,
        realm=generate.REALM,
        device_id=documents.device_id(1),
        rotation_count=0,
    )
    assert rotation.signature_key == generate.signing_key("device 1 next").public


def test_heads_of_the_audit_log() -> None:
    key = pb.PublicKey.FromString(data(AUDIT, "log_key"))
    signed = [pb.SignedEnvelope.FromString(bytes.fromhex(head)) for head in AUDIT["heads"]]
    first, second = (
        open_tree_head(head, [PublicKey.from_proto(key)], AUDIT["origin"]) for head in signed
    )
    proof = pb.ConsistencyProof.FromString(data(AUDIT, "consistency"))
    check_growth(first, second, proof)
    roots = [bytes.fromhex(head.root_digest) for head in (first, second)]
    verifier.check_consistency(roots[0], roots[1], proof)


def test_checkpoint_line() -> None:
    signed = pb.SignedEnvelope.FromString(bytes.fromhex(AUDIT["heads"][1]))
    assert checkpoint_line(signed) == AUDIT["checkpoint_line"]
    assert parse_checkpoint_line(AUDIT["checkpoint_line"]) == signed
