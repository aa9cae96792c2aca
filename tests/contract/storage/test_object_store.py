"""Faults of an object store are typed errors, repeated within bounds, and lose nothing that was acknowledged."""

import dataclasses
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_server.aggregation.aggregator import REST_S
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.errors import (
    BucketMissingError,
    ObjectStoreDeniedError,
    ObjectStoreThrottledError,
    ObjectStoreUnavailableError,
    PayloadStoreConflictError,
    PayloadStoreMismatchError,
    PayloadStoreNotConfiguredError,
    QflareError,
    StorageFullError,
)
from qflare_server.serving.maintenance import Maintenance
from qflare_server.storage.payload_store import bucket, objects
from qflare_server.storage.payload_store.objects import PayloadBucket
from qflare_server.storage.repository import payloads
from qflare_server.training.retention import sweep, sweep_orphans
from qflare_server.verification.payload_stores import verify_payloads
from tests.conftest import FakeClock
from tests.contract.conftest import MakeCore
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.identity import everything_stored
from tests.support.object_store import GIVEN_ENDPOINT, KEY_ID, SECRET, delete_object, request
from tests.support.use_cases import CoordinatorHarness, vector

BIG = 700_000  # elements: three chunks of float32
any_credentials = pytest.mark.skipif(
    bool(GIVEN_ENDPOINT), reason="needs a server that verifies no signature"
)
ONE = training_pb2.RoundPolicy(quorum=1)
PLACE = "s3://qflare-tests/"


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return the URL of a database of the test's own; the store is the same with both databases."""
    return sqlite_url


@pytest.fixture
def proxy(object_store_endpoint: str) -> Iterator[FaultProxy]:
    """Yield a proxy in front of the object store."""
    with FaultProxy(object_store_endpoint) as made:
        yield made


@pytest.fixture
def settings(object_settings: dict[str, Any], proxy: FaultProxy) -> dict[str, Any]:
    """Return settings that put every payload into the object store behind the proxy."""
    return object_settings | {
        "object_store_endpoint": proxy.url,
        "object_store_timeout_s": 5.0,
        "inline_payload_bytes": 0,
        "upload_batch_bytes": 2**20,
    }


@pytest.fixture
def core(make_core: MakeCore, settings: dict[str, Any]) -> CoordinatorHarness:
    """Return a coordinator with four devices behind the proxy, whose parts are one chunk each."""
    made = make_core(**settings)
    made.add_devices(4)
    return made


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a part for each chunk, so that payloads of three chunks have three."""
    monkeypatch.setattr(PayloadBucket, "batch_bytes", 2**20)


def start(core: CoordinatorHarness) -> str:
    return core.start(vector(0.0, BIG), rounds=ONE, total_rounds=20)


def weights_of(value: float) -> bytes:
    return np.full(BIG, value, "<f4").tobytes()


PASSING = [
    Fault("answer", 500, "InternalError", 2),
    Fault("answer", 503, "SlowDown", 2),
    Fault("answer", 429, "TooManyRequests", 2),
    Fault("reset", count=2),
    Fault("lose", count=2),
    Fault("cut", count=1, methods=("GET",)),
]


def test_a_fault_that_passes_is_not_noticed(core: CoordinatorHarness, proxy: FaultProxy) -> None:
    session_id = start(core)
    for version, fault in enumerate(PASSING, 1):
        for methods in (("PUT",), ("GET",)):
            if set(methods) <= set(fault.methods):
                proxy.fault = dataclasses.replace(fault, methods=methods)
        core.submit("device-0", session_id, vector(float(version), BIG))
        proxy.fault = dataclasses.replace(fault, methods=("GET",))
        core.settle()

        assert core.weights(session_id, version) == weights_of(version)
    assert [verdict.problem for verdict in verify_payloads(core.context) if verdict.problem] == []


LASTING = [
    (
        Fault("answer", 500, "InternalError"),
        ObjectStoreUnavailableError,
        "OBJECT_STORE_UNAVAILABLE",
    ),
    (Fault("answer", 503, "SlowDown"), ObjectStoreThrottledError, "OBJECT_STORE_THROTTLED"),
    (Fault("answer", 429, "TooMany"), ObjectStoreThrottledError, "OBJECT_STORE_THROTTLED"),
    (Fault("answer", 400, "ExpiredToken"), ObjectStoreDeniedError, "OBJECT_STORE_DENIED"),
    (Fault("answer", 403, "AccessDenied"), ObjectStoreDeniedError, "OBJECT_STORE_DENIED"),
    (Fault("answer", 404, "NoSuchBucket"), BucketMissingError, "OBJECT_STORE_BUCKET_MISSING"),
    (
        Fault("answer", 409, "OperationAborted"),
        ObjectStoreUnavailableError,
        "OBJECT_STORE_UNAVAILABLE",
    ),
    (Fault("answer", 507, "XMinioStorageFull"), StorageFullError, "STORAGE_FULL"),
    (Fault("reset"), ObjectStoreUnavailableError, "OBJECT_STORE_UNAVAILABLE"),
    (Fault("lose"), ObjectStoreUnavailableError, "OBJECT_STORE_UNAVAILABLE"),
]


def test_a_fault_that_lasts_is_a_typed_error_and_loses_nothing(
    make_core: MakeCore,
    settings: dict[str, Any],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket, "MAX_RETRIES", 1)
    core = make_core(**settings)
    core.add_devices(1)
    session_id = start(core)
    for version, (fault, kind, reason) in enumerate(LASTING, 1):
        draft = core.draft("device-0", session_id, vector(float(version), BIG))

        def pieces(chunks: Any = draft.chunks, fault: Fault = fault) -> Iterator[tuple[int, bytes]]:
            yield from chunks[:2]
            proxy.fault = dataclasses.replace(fault)
            yield chunks[2]

        with pytest.raises(kind) as caught:
            core.send(draft, pieces())
        proxy.fault = None
        assert isinstance(caught.value, QflareError)
        assert caught.value.reason == reason
        following, _ = core.uploads.find(draft.device, draft.statement.update_id)
        core.send(draft, draft.chunks[following:])
        proxy.fault = dataclasses.replace(fault)
        with suppress(kind):
            core.settle()
        proxy.fault = None
        core.settle()

        assert following >= 1
        assert core.round(session_id, version).accepted_count == 1
        assert core.weights(session_id, version) == weights_of(version)


def test_no_credential_is_in_an_error_or_in_the_database(
    core: CoordinatorHarness, proxy: FaultProxy
) -> None:
    for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
        proxy.fault = Fault(
            "answer", 403, f"{code}</Code><AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId><Code>"
        )
        with pytest.raises(ObjectStoreDeniedError) as caught:
            core.store.stored_count("p")
        said = "".join(traceback.format_exception(caught.value))
        assert KEY_ID not in said
        assert SECRET not in said

    assert SECRET.encode() not in everything_stored(core.database)
    assert KEY_ID.encode() not in everything_stored(core.database)


def test_a_store_that_does_not_answer_is_given_up_in_bounded_time(
    make_core: MakeCore,
    settings: dict[str, Any],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket, "MAX_RETRIES", 1)
    core = make_core(**settings)
    impatient = make_core(**(settings | {"object_store_timeout_s": 0.5}))
    core.store.append("p", 0, [b"a"])
    proxy.fault = Fault("hang", count=2)

    with pytest.raises(ObjectStoreUnavailableError, match="answer"):
        impatient.store.append("p", 1, [b"b"])

    assert proxy.fault.count == 0
    assert core.store.read("p", 0, 2) == [b"a"]


@any_credentials
def test_replaced_credentials_need_no_restart(
    make_core: MakeCore,
    settings: dict[str, Any],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket, "REREAD_S", -60)
    core = make_core(**settings)
    proxy.accepted_key_id = "AKIANEXT"
    with pytest.raises(ObjectStoreDeniedError, match="ExpiredToken"):
        core.store.append("p", 0, [b"a"])

    file: Path = settings["object_store_credentials_file"]
    file.write_text(file.read_text().replace(KEY_ID, "AKIANEXT"))
    for _attempt in range(2000):  # the library asks for credentials every 100 ms at most
        with suppress(ObjectStoreDeniedError):
            core.store.append("p", 0, [b"a"])
            break

    assert core.store.read("p", 0, 1) == [b"a"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[default]\n",
        "[default]\naws_secret_access_key = hidden\n",
        "hidden\n",
        "[default]\nhidden = 1\n",
    ],
)
def test_a_file_without_credentials_is_refused_and_not_quoted(
    make_core: MakeCore, settings: dict[str, Any], text: str
) -> None:
    file: Path = settings["object_store_credentials_file"]
    file.write_text(text)

    with pytest.raises(ConfigError, match="CREDENTIALS_FILE") as caught:
        make_core(**settings)

    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://bucket/prefix", ""),
        ("s3://key:hidden@bucket/prefix", ""),
        ("s3://bucket?secret=hidden", ""),
        ("s3://", ""),
        ("s3://bucket", "http://store.example.org"),
        ("s3://bucket", "https://key:hidden@store.example.org"),
        ("s3://bucket", "store.example.org"),
        ("", ""),
    ],
)
def test_a_place_that_is_none_or_has_secrets_is_refused(url: str, endpoint: str) -> None:
    config = ServerConfig(
        payload_store="object", object_store_url=url, object_store_endpoint=endpoint
    )

    with pytest.raises(ConfigError, match="QFLARE_OBJECT_STORE_") as caught:
        config.checked()

    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("url", ["gs://bucket/a/b", "az://container/a", "s3://a.bucket-1"])
def test_places_of_all_providers_are_accepted(url: str) -> None:
    checked = ServerConfig(payload_store="object", object_store_url=url).checked()

    assert checked.object_store_url == url


@any_credentials
def test_a_bucket_that_is_deleted_is_found(
    make_core: MakeCore, settings: dict[str, Any], object_store_endpoint: str
) -> None:
    place = f"{object_store_endpoint}/deleted-bucket"
    request(place, "PUT")
    core = make_core(**(settings | {"object_store_url": "s3://deleted-bucket"}))
    core.store.append("p", 0, [b"a"])
    core.store.check()
    core.store.delete(["p"])
    request(f"{place}/{objects.MARKER_KEY}", "DELETE")
    request(place, "DELETE")

    for call in (
        lambda: core.store.append("p", 0, [b"a"]),
        lambda: core.store.read("p", 0, 1),
        lambda: core.store.complete("p", 1),
        lambda: list(core.store.payload_ids()),
        lambda: core.store.delete(["p"]),
        core.store.identity,
    ):
        with pytest.raises(BucketMissingError):
            call()
    with pytest.raises(BucketMissingError):
        make_core(**(settings | {"object_store_url": "s3://deleted-bucket"}))


def test_a_bucket_that_was_emptied_is_unhealthy(
    core: CoordinatorHarness,
    settings: dict[str, Any],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objects, "CHECK_S", 0.0)
    core.store.check()
    proxy.fault = Fault("answer", 503, "SlowDown")
    with pytest.raises(ObjectStoreThrottledError):
        core.store.check()
    proxy.fault = None
    core.store.check()

    delete_object(settings, objects.MARKER_KEY)

    with pytest.raises(ObjectStoreUnavailableError, match="emptied or replaced"):
        core.store.check()


def test_a_place_of_another_database_is_refused(
    make_core: MakeCore, settings: dict[str, Any]
) -> None:
    core = make_core(**settings)
    core.add_devices(1)
    start(core)

    with pytest.raises(PayloadStoreMismatchError, match="lacks the payloads") as caught:
        make_core(**(settings | {"object_store_url": settings["object_store_url"] + "-other"}))

    assert "QFLARE_OBJECT_STORE_URL" in caught.value.remedy


def test_a_part_that_is_missing_or_altered_is_found(
    core: CoordinatorHarness, settings: dict[str, Any]
) -> None:
    session_id = start(core)
    core.submit("device-0", session_id, vector(1.0, BIG))
    (first, second) = sorted(core.store.payload_ids())

    core.store.append(first, 1, [bytes(2**20)])
    delete_object(settings, f"payloads/{second}/00000001-00000001")
    problems = {verdict.payload_id: verdict.problem for verdict in verify_payloads(core.context)}

    assert "missing" in problems[second]
    assert core.store.stored_count(second) == 1


def test_overlapping_parts_are_read_as_they_were_written(core: CoordinatorHarness) -> None:
    whole = [bytes([number]) * 2**20 for number in range(5)] + [b"end"]
    core.store.append("p", 0, whole)
    new = bytes([9]) * 2**20

    core.store.append("p", 0, [new, new])
    core.store.append("p", 3, [new])

    wanted = [new, new, whole[2], new, whole[4], b"end"]
    assert core.store.read("p", 0, 10) == wanted
    core.store.complete("p", 5 * 2**20 + 3)
    core.store.truncate("p", 4)
    assert (core.store.read("p", 0, 10), core.store.stored_count("p")) == (wanted[:4], 4)


def test_the_library_is_needed_only_where_the_store_is_chosen(
    make_core: MakeCore, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for name in ("bucket", "objects"):
        monkeypatch.delitem(sys.modules, f"qflare_server.storage.payload_store.{name}")

    make_core(**(settings | {"payload_store": "files"}))
    with pytest.raises(ConfigError, match="QFLARE_OBJECT_STORE_URL needs obstore") as caught:
        make_core(**settings)

    assert caught.value.remedy == "pip install 'qflare[object-store]'"


def test_the_library_is_not_imported_by_the_coordinator() -> None:
    check = "import sys, qflare_server.serving.coordinator; sys.exit('obstore' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", check], check=False)

    assert done.returncode == 0


def join(core: CoordinatorHarness, replica_id: str) -> None:
    """Join the coordinators of the database, as a starting process does."""
    unused = cast("Any", None)
    Maintenance(core.context, unused, unused, replica_id, "127.0.0.1:1", lambda **_: None).join()


@pytest.mark.parametrize("ours", ["files", "database", "object"])
@pytest.mark.parametrize("theirs", ["files", "database", "object"])
def test_coordinators_with_different_stores_are_refused(
    make_core: MakeCore, settings: dict[str, Any], ours: str, theirs: str
) -> None:
    first = make_core(**(settings | {"payload_store": theirs}))
    second = make_core(**(settings | {"payload_store": ours}))
    join(first, "first")

    if ours == theirs:
        join(second, "second")
        return
    with pytest.raises(PayloadStoreConflictError, match=theirs) as caught:
        join(second, "second")

    assert isinstance(caught.value, QflareError)
    assert "object" in caught.value.remedy


def test_retention_and_sweeps_wait_for_the_store(
    core: CoordinatorHarness, proxy: FaultProxy
) -> None:
    policy = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_NONE)
    session_id = core.start(vector(0.0, BIG), rounds=ONE, transfer=policy)
    core.submit("device-0", session_id, vector(1.0, BIG))
    core.settle()
    proxy.fault = Fault("answer", 403, "AccessDenied")

    with pytest.raises(ObjectStoreDeniedError):
        sweep(core.context)
    proxy.fault = None
    sweep(core.context)

    with core.database.read() as session:
        kept = {row.chunks_id for row in payloads.in_stores(session, None, "", 10)}
    assert set(core.store.payload_ids()) == kept
    (update,) = core.updates(session_id, 1)
    assert update.payload_id not in kept


def test_a_slow_store_is_waited_for_and_asked_again(
    make_core: MakeCore, settings: dict[str, Any], proxy: FaultProxy
) -> None:
    core = make_core(**settings | {"object_store_timeout_s": 1.0})
    core.add_devices(1)
    session_id = start(core)
    for version, method in enumerate(("PUT", "GET"), 1):
        draft = core.draft("device-0", session_id, vector(float(version), BIG))
        if method == "PUT":
            proxy.fault = Fault("hang", count=1, methods=(method,))
        core.send(draft)
        if method == "GET":
            proxy.fault = Fault("hang", count=1, methods=(method,))
        core.settle()

        assert proxy.fault is not None
        assert proxy.fault.count == 0
        assert core.weights(session_id, version) == weights_of(version)


@pytest.mark.parametrize("harm", ["altered", "missing"])
@pytest.mark.parametrize("rule", ["fedavg", "median"])
def test_a_part_that_was_altered_or_is_missing_is_not_folded(
    core: CoordinatorHarness,
    clock: FakeClock,
    settings: dict[str, Any],
    rule: str,
    harm: str,
) -> None:
    """The bytes are hashed again while they are folded, however long ago they were received."""
    policy = training_pb2.RoundPolicy(quorum=3)
    strategy = training_pb2.StrategyConfig(name=rule)
    session_id = core.start(vector(0.0, BIG), rounds=policy, strategy=strategy)
    names = [
        core.submit(f"device-{number}", session_id, vector(float(number), BIG)).update_id
        for number in range(3)
    ]
    harmed = next(row for row in core.updates(session_id, 1) if row.id == names[1])
    key = f"{harmed.payload_id}/00000002-00000001"
    if harm == "altered":
        (chunk,) = core.store.read(harmed.payload_id, 2, 1)
        core.store.append(harmed.payload_id, 2, [bytes([chunk[0] ^ 1]) + chunk[1:]])
    else:
        delete_object(settings, f"payloads/{key}")

    core.settle()
    clock.advance(REST_S + 1)  # it was read once more before it is refused
    core.settle()

    states = {row.id: row.state for row in core.updates(session_id, 1)}
    assert [states[name] for name in names] == ["aggregated", "rejected", "aggregated"]
    assert core.weights(session_id, 1) == weights_of(1.0)


def test_a_round_waits_for_a_store_that_is_not_configured_any_more(
    make_core: MakeCore, core: CoordinatorHarness, settings: dict[str, Any], clock: FakeClock
) -> None:
    session_id = start(core)
    core.submit("device-0", session_id, vector(1.0, BIG))
    local = {"payload_store": "files", "inline_payload_bytes": 0}
    without = make_core(**local)

    with pytest.raises(PayloadStoreNotConfiguredError):
        without.settle()
    with pytest.raises(PayloadStoreNotConfiguredError):
        without.weights(session_id, 0)
    assert sweep_orphans(without.context) == 0
    clock.advance(core.config.lease_s + 1)
    switched = make_core(**(settings | local))
    switched.settle()

    assert switched.weights(session_id, 1) == weights_of(1.0)
    assert {verdict.store: verdict.problem for verdict in verify_payloads(switched.context)} == {
        "files": "",
        "object": "",
    }


def test_orphans_are_swept_and_figures_are_those_of_the_bucket(core: CoordinatorHarness) -> None:
    session_id = start(core)
    core.submit("device-0", session_id, vector(1.0, BIG))
    core.settle()
    kept = core.store.size_bytes()
    core.store.append("orphan", 0, [bytes(2**20), b"end"])

    assert kept >= 3 * len(weights_of(1.0))
    assert core.store.size_bytes() == kept + 2**20 + 3
    assert sweep_orphans(core.context) == 1
    assert core.store.size_bytes() == kept
    assert [verdict for verdict in verify_payloads(core.context) if verdict.problem] == []
    assert core.weights(session_id, 1) == weights_of(1.0)
