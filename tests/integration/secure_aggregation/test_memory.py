"""Memory of a round with secure aggregation, of coordinator and helper: bounded whatever the number of updates."""

import gc
import tracemalloc
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from qflare.crypto.signing import SigningKey
from qflare.evidence.statements import sign_update
from qflare.evidence.unmasking import Masking, masking_of
from qflare.tensors import Array, Manifest, payload_digest
from qflare.v1 import coordinator_service_pb2, helper_service_pb2, security_pb2, training_pb2
from qflare_client.models.masked_update import (
    QuantizedUpdate,
    add_masks,
    quantize_update,
    seal_seeds,
)
from qflare_helper.exchange import header_of, respond
from qflare_helper.identity import HelperIdentity
from qflare_helper.ledger import Ledger
from qflare_helper.policy import write_policy
from qflare_helper.unmasking import Unmasking
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.aggregation.fold import BATCH_BYTES
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.serving.application import Application
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import SYSTEM, Caller
from qflare_server.use_cases import build_use_cases
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.in_process.devices import KnownDevice, KnownDevices, PublicKeys
from qflare_server.use_cases.updates.submission import Contributor
from tests.support.jobs import prepare

ELEMENTS: Final = 60_000
"""Of the model: its masked updates are in rows, as large as these get."""
FEW: Final = 30
MANY: Final = 120
"""Updates of two rounds. Those of the first are more than are read at once."""
BYTES_AN_UPDATE: Final = 4_000
"""Most bytes that an update may add to what coordinator and helper hold at once: ids, digests, a seed, a key stream."""


class Helper:
    """A helper with the code of a real one, in this process, so that its memory counts too."""

    def __init__(self, parts: Application, home: Path) -> None:
        home.mkdir()
        write_policy(home, 2)
        identity = HelperIdentity.generate(bootstrap_bundle(parts.keys.trust, "a:1"), "a:1", "")
        self._unmasking = Unmasking(identity, Ledger(home), home, 2**30)
        self._document = identity.bundle.document
        self.helper_id = identity.helper_id
        self.sign_request = parts.keys.sign_request

    def documents(self) -> Mapping[str, security_pb2.SignedEnvelope]:
        return {self.helper_id: self._document}

    def unmask(
        self, helper_id: str, parts: Iterator[helper_service_pb2.UnmaskRequest]
    ) -> Iterator[helper_service_pb2.UnmaskResponse]:
        assert helper_id == self.helper_id
        yield from respond(self._unmasking, self._unmasking.open(header_of(parts)), parts)

    def close(self) -> None:
        pass


class SecureCoordinator:
    """A coordinator without its network, with a helper, whose devices hold keys only."""

    def __init__(self, parts: Application, folder: Path) -> None:
        self._helper = Helper(parts, folder / "helper")
        context = replace(parts.context, helpers=self._helper)
        use_cases = build_use_cases(context, parts.keys, parts.executor)
        self.parts = replace(parts, context=context, use_cases=use_cases)
        self.aggregator = Aggregator(context, parts.executor, "one", waits_for_helpers=True)
        self._devices: list[tuple[Contributor, SigningKey]] = []

    def session(self, quorum: int) -> str:
        policy = training_pb2.SecureAggregationPolicy(
            mode=training_pb2.SECURE_AGGREGATION_MODE_HELPER,
            clip=100.0,
            helpers=[self._helper.helper_id],
        )
        weights: dict[str, Array] = {"w": np.zeros(ELEMENTS, np.float32)}
        return prepare(self.parts, weights, quorum=quorum, rounds=1, secure=policy)

    def devices(self, count: int) -> list[tuple[Contributor, SigningKey]]:
        while len(self._devices) < count:
            name, key = f"device-{len(self._devices)}", SigningKey.generate()
            known = KnownDevice(name, Profile(), PublicKeys(key.public))
            KnownDevices(self.parts.context).add(SYSTEM, known)
            public = key.public.key_id, int(key.public.algorithm), key.public.data
            self._devices.append((Contributor(name, *public), key))
        return self._devices[:count]

    def submit(self, session_id: str, count: int) -> None:
        """Submit masked updates, which are alike but for their masks."""
        base: dict[str, Array] = {"w": np.zeros(ELEMENTS, np.float32)}
        change: dict[str, Array] = {"w": np.full(ELEMENTS, 0.001, np.float32)}
        devices = self.devices(count)
        found = self.parts.use_cases.tasks.next_task(devices[0][0].device_id, session_id)
        assert found.round is not None
        task = security_pb2.SignedEnvelope.FromString(found.round.task or b"")
        masking = masking_of(task)
        assert masking is not None
        quantized = quantize_update(masking, Manifest.from_arrays(base), change, base, 100, {})
        stated = security_pb2.TaskStatement.FromString(task.payload)
        for contributor, key in devices:
            self._submit(masking, stated, quantized, contributor, key)

    def _submit(
        self,
        masking: Masking,
        task: security_pb2.TaskStatement,
        quantized: QuantizedUpdate,
        contributor: Contributor,
        key: SigningKey,
    ) -> None:
        own = QuantizedUpdate(quantized.layout, quantized.vector.copy())
        seeds, data = add_masks(masking, own), own.vector.tobytes()
        digest = payload_digest([data])
        statement = security_pb2.UpdateStatement(
            realm=task.realm,
            training_session_id=task.training_session_id,
            round_number=task.round_number,
            task_nonce=task.task_nonce,
            update_id=str(uuid.uuid4()),
            device_id=contributor.device_id,
            key_id=key.public.key_id,
            base_version=task.base_version,
            base_digest=task.base_digest,
            layout_digest=own.layout.layout_digest,
            size_bytes=len(data),
            payload_digest=digest,
            wire_digest=digest,
            kind=task.transfer.update_kind,
            encoding=task.transfer.update_encoding,
            example_count=100,
        )
        seal_seeds(masking, seeds, statement)
        header = coordinator_service_pb2.UpdateHeader(statement=sign_update(key, statement))
        caller = Caller(f"device:{contributor.device_id}")
        self.parts.use_cases.uploads.submit(caller, contributor, header, iter([(0, data)]))

    def peak_of_round(self, count: int) -> int:
        """Aggregate a round of so many updates; return the most bytes that it held at once beyond those before it."""
        session_id = self.session(count)
        self.submit(session_id, count)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        while self.aggregator.run_once():
            pass
        peak = tracemalloc.get_traced_memory()[1]
        version, _ = self.parts.use_cases.training.list_models(session_id, PageRequest(2)).rows
        assert version.participant_count == count
        return peak - before


def test_a_round_holds_no_more_with_many_updates_than_with_few(
    parts: Application, tmp_path: Path
) -> None:
    made = SecureCoordinator(parts, tmp_path)
    made.devices(MANY)
    tracemalloc.start()
    try:
        made.peak_of_round(2)  # loads code and fills caches
        few, many = made.peak_of_round(FEW), made.peak_of_round(MANY)
    finally:
        tracemalloc.stop()

    assert 4 * ELEMENTS * FEW > BATCH_BYTES
    assert many - few < (MANY - FEW) * BYTES_AN_UPDATE
