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
from qflare.crypto import sealed_payloads, sealing, signature_libraries, signing
from qflare.crypto.signing import InvalidSignatureError, PublicKey, SigningContext
from qflare.evidence import statements, unmasking
from qflare.evidence.checkpoints import checkpoint_line, parse_checkpoint_line
from qflare.evidence.statements import (
    check_growth,
    open_evaluation,
    open_rotation,
    open_task,
    open_tree_head,
    open_update,
)
from qflare.protocol import constraints, keysets
from qflare.protocol import login as login_protocol
from qflare.protocol.constraints import constraint_of
from qflare.protocol.enrollment import MAX_TOKEN_CHARACTERS, EnrollmentServer
from qflare.protocol.keysets import ExpiredKeysetError, KeyRole, TrustedKeyset
from qflare.tensors import CHUNK_BYTES, ManifestLimits
from qflare.tensors.manifest import MAX_NAME_BYTES, MAX_RANK
from qflare.v1 import constraints_pb2, tensor_pb2
from qflare.v1 import coordinator_service_pb2 as calls
from qflare.v1 import security_pb2 as pb
from qflare_client.errors import InvalidEvidenceError
from qflare_client.models.upload import LONGEST_FIRST_CHUNK_BYTES
from qflare_client.trust.evidence import Evidence, verify
from qflare_helper import service as helper
from qflare_server import errors
from qflare_server.config import ServerConfig
from qflare_server.keys import trust_documents
from qflare_server.serving import maintenance
from qflare_server.serving.rpc import limits, status
from qflare_server.serving.rpc.encoding import values
from qflare_server.storage import paging
from qflare_server.storage.repository import global_models, idempotent_calls
from qflare_server.training import config as training_config
from qflare_server.use_cases.access import authentication, login
from qflare_server.use_cases.training_sessions import administration
from qflare_server.use_cases.updates import upload
from qflare_server.use_cases.versions import download
from tests.independent import exchange, verifier
from tests.independent.verifier import RefusedError
from tests.vectors.protocol import documents, generate

FOLDER = Path(generate.__file__).parent
DOCUMENTS = FOLDER.parents[2] / "docs"
PAGE = (DOCUMENTS / "protocol.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
SIZES = {1: (1312, 2420), 2: (1952, 3309), 3: (2592, 4627), 4: (1984, 3373)}
KIB, MIB = 2**10, 2**20


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


def rows(heading: str, start: str = "| `") -> list[list[str]]:
    """Return the cells of the first table under a heading of the page, of the lines with a beginning."""
    section = PAGE.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    table = section[section.index("\n|") + 1 :].split("\n\n", 1)[0]
    lines = [line for line in table.splitlines() if line.startswith(start)]
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


def test_the_page_lists_every_refusal_of_a_helper_with_its_status() -> None:
    listed = {reason.strip("`"): status.strip("`") for reason, status, _when in rows("17. ")}
    assert listed == {kind.reason: code.name for kind, code in helper.CODES.items()}


def test_the_page_states_the_sizes_of_every_algorithm() -> None:
    section = PAGE.split("| algorithm | number |", 1)[1].split("\n\n", 1)[0]
    listed = re.findall(r"\| (\d+) \| (\d+) \| (\d+) \|", section)
    assert [tuple(map(int, row)) for row in listed] == [
        (int(algorithm), sizes.public_bytes, sizes.signature_bytes)
        for algorithm, sizes in sorted(signature_libraries.SIZES.items())
    ]


def default_of(kind: type[Any], name: str) -> Any:
    """Return the default of an argument of a constructor."""
    return inspect.signature(kind).parameters[name].default


def bound_of(message: type[Any], field: str) -> constraints_pb2.Constraint:
    """Return the constraint of a field."""
    return constraint_of(message.DESCRIPTOR.fields_by_name[field])


CONFIG = ServerConfig()
NUMBERS: list[tuple[str, tuple[float, ...]]] = [
    ("A message is at most {} bytes long", (signing.MAX_MESSAGE_BYTES,)),
    (
        "rejects a payload over {} bytes, more than {} signatures",
        (signing.MAX_MESSAGE_BYTES, envelopes.MAX_SIGNATURE_COUNT),
    ),
    ("number {:d} (0x647A)", (pb.KEM_ALGORITHM_X_WING,)),
    (
        "public key {:d} bytes, encapsulation {:d} bytes, secret {} bytes",
        (sealing.PUBLIC_KEY_BYTES, sealing.ENCAPSULATION_BYTES, sealing.SECRET_BYTES),
    ),
    ("at most {} tensors of at most {} dimensions", (ManifestLimits().max_tensors, MAX_RANK)),
    ("unique, and 1 to {} bytes of UTF-8", (MAX_NAME_BYTES,)),
    ("hashed in chunks of {} bytes", (CHUNK_BYTES,)),
    ("up to {} documents in total", (keysets.MAX_ROOT_COUNT,)),
    (
        "at most {} documents with at most {} keys each",
        (keysets.MAX_ROOT_COUNT, envelopes.MAX_SIGNATURE_COUNT),
    ),
    ("at most {} keys and no duplicates", (keysets.MAX_KEY_COUNT,)),
    ("valid for {} seconds.", (default_of(EnrollmentServer, "lifetime").seconds,)),
    (
        "valid for {} seconds and for one login",
        (default_of(login_protocol.LoginServer, "lifetime").seconds,),
    ),
    ("`protocol_version` {}", (login_protocol.PROTOCOL_VERSION,)),
    ("may make {} logins", (CONFIG.max_device_records_per_hour,)),
    ("and at most {} characters", (authentication.MAX_TOKEN_CHARACTERS,)),
    ("the latest {} tokens", (login.MAX_TOKENS_OF_DEVICE,)),
    (
        "at most {} links and {} KiB of them",
        (download.MAX_LINKS, download.MAX_LINK_BYTES / KIB),
    ),
    (
        "at most {} metrics, with names of 1 to {} printable",
        (statements.MAX_METRIC_COUNT, statements.MAX_METRIC_NAME_CHARACTERS),
    ),
    ("if the payload exceeds {} KiB", (LONGEST_FIRST_CHUNK_BYTES / KIB,)),
    ("takes 1 to {} small updates", (bound_of(calls.SubmitUpdatesRequest, "updates").max_items,)),
    ("`QFLARE_INLINE_PAYLOAD_BYTES`, {} KiB by default", (CONFIG.inline_payload_bytes / KIB,)),
    ("Small payloads (up to {} KiB by default)", (CONFIG.inline_payload_bytes / KIB,)),
    ("in a message of at most {} MiB", (CONFIG.max_message_bytes / MIB,)),
    ("expires after one hour by default", (CONFIG.upload_expiry_s / 3600 == 1,)),
    ("at most {} unfinished uploads", (upload.MAX_UPLOADS_OF_DEVICE,)),
    (
        "(at most {} characters) and an optional short text (at most {})",
        tuple(bound_of(calls.ReportFailureRequest, name).max_length for name in ("kind", "text")),
    ),
    ("consists of a {}-byte header", (sealed_payloads.HEADER_BYTES,)),
    (
        'H("qflare/v1/seal", header, recipient key id))`, {:d} bytes',
        (sealed_payloads.WRAPPED_KEY_BYTES,),
    ),
    ("split into pieces of {} bytes", (sealed_payloads.PLAINTEXT_BYTES,)),
    ("lists the first {} invalid", (constraints.MAX_VIOLATIONS,)),
    ("message over {} MiB and", (CONFIG.max_message_bytes / MIB,)),
    ("metadata over {} KiB", (limits.MAX_METADATA_BYTES / KIB,)),
    (
        "texts are at most {} bytes, and metadata values at most {}",
        (status.MAX_TEXT_BYTES, status.MAX_VALUE_BYTES),
    ),
    (
        "for {} hours (the latest {} calls)",
        (maintenance.CALL_MEMORY.total_seconds() / 3600, idempotent_calls.MAX_KEPT),
    ),
    ("No message of the coordinator exceeds {} MiB", (limits.MAX_ANSWER_BYTES / MIB,)),
    (
        "or about {} MiB, `GetLineage` after {} MiB of statements, and `GetKeyset` after {} MiB of root",
        (
            paging.MAX_PAGE_BYTES / MIB,
            global_models.MAX_STATEMENTS_BYTES / MIB,
            trust_documents.MAX_ROOTS_BYTES / MIB,
        ),
    ),
    ("limited to {} MiB, and", (training_config.MAX_DESCRIPTION_BYTES / MIB,)),
    ("of a training session to {} KiB", (administration.MAX_ARCHITECTURE_BYTES / KIB,)),
    ("only if its header is at most {} MiB", (values.MAX_SHARED_BYTES / MIB,)),
    ("1 to {} different ones", (unmasking.MAX_HELPER_COUNT,)),
    ("`policy.min_cohort` is at least {}", (unmasking.MIN_COHORT,)),
]
LIMITS: dict[str, tuple[str, tuple[float, ...]]] = {
    "gRPC message": (
        "{} MiB by default; a chunk is {} MiB",
        (CONFIG.max_message_bytes / MIB, CHUNK_BYTES / MIB),
    ),
    "signed payload": ("{} bytes", (signing.MAX_MESSAGE_BYTES,)),
    "signatures in an envelope": ("{}", (envelopes.MAX_SIGNATURE_COUNT,)),
    "root documents, keys in a keyset": ("{}, {}", (keysets.MAX_ROOT_COUNT, keysets.MAX_KEY_COUNT)),
    "metrics of a statement": (
        "{}, with names of {} characters",
        (statements.MAX_METRIC_COUNT, statements.MAX_METRIC_NAME_CHARACTERS),
    ),
    "tensors of a manifest": ("{}", (ManifestLimits().max_tensors,)),
    "enrollment token": ("{} characters", (MAX_TOKEN_CHARACTERS,)),
    "realm and device id in a hello": ("{} characters", (login_protocol.MAX_ID_CHARACTERS,)),
    "payload of an update": (
        "{} GiB by default (`QFLARE_MAX_PAYLOAD_BYTES`)",
        (CONFIG.max_payload_bytes / 2**30,),
    ),
    "unfinished uploads of a device": ("{}", (upload.MAX_UPLOADS_OF_DEVICE,)),
    "statements of one `GetLineage`": (
        "{}, and {} MiB of statements and signatures; continue after the last one",
        (download.MAX_LINKS, global_models.MAX_STATEMENTS_BYTES / MIB),
    ),
    "links of a header": (
        "{}, and {} KiB of statements and signatures; `GetLineage` returns the others",
        (download.MAX_LINKS, download.MAX_LINK_BYTES / KIB),
    ),
    "header of a sealed payload, wrapped keys in a message": (
        "{} bytes, 1 of {:d} bytes",
        (sealed_payloads.HEADER_BYTES, sealed_payloads.WRAPPED_KEY_BYTES),
    ),
}


def stated(words: str, numbers: tuple[float, ...]) -> str:
    """Return a sentence of the page with the numbers of the code; whole ones are written without a fraction."""
    whole = [int(number) if number == int(number) else number for number in numbers]
    return words.replace("{}", "{:,}").format(*whole)


@pytest.mark.parametrize(("words", "numbers"), NUMBERS, ids=[words for words, _ in NUMBERS])
def test_numbers_of_the_page_are_those_of_the_code(words: str, numbers: tuple[float, ...]) -> None:
    assert all(numbers)
    assert stated(words, numbers) in WORDS


def test_limits_of_the_page_are_those_of_the_code() -> None:
    listed = dict(rows("15. ", "| ")[1:])
    assert listed == {name: stated(*limit) for name, limit in LIMITS.items()}


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
