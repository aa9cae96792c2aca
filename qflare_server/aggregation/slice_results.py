"""Results of slices: written to the payload store by one coordinator, read and checked by another.

A result is a payload of float64 values, little-endian, sealed where the training session seals its versions. It may
hold infinity and NaN: which update is to blame for them is found by the leader, in the version.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from qflare.crypto.symmetric import UnsealError, check_equal
from qflare.tensors import CHUNK_BYTES, payload_digest
from qflare.tensors.manifest import DType, Manifest, TensorSpec
from qflare_server.aggregation.pass_inputs import ELEMENT_BYTES, PassInputs, authenticator
from qflare_server.aggregation.plan import RoundPlan
from qflare_server.context import Context
from qflare_server.errors import DamagedPayloadError
from qflare_server.payloads.reader import PayloadBytes, check_digests, read_range
from qflare_server.payloads.sealed_receiver import version_seal_context
from qflare_server.payloads.writer import PayloadWriter
from qflare_server.storage.payload_records import ReceivedPayload, StoredPayload, describe
from qflare_server.storage.repository import fold_slices, payloads
from qflare_server.storage.repository.fold_slices import FoldPass, SliceLease, SliceResult

SEAL_NAME: Final = "slice"
AHEAD: Final = 4


class LeaseLostError(Exception):
    """A slice was acquired by another coordinator, has a result, or its pass has ended. Never sent over the wire."""


def store_result(
    context: Context,
    executor: ThreadPoolExecutor,
    plan: RoundPlan,
    found: FoldPass,
    lease: SliceLease,
    values: Iterator[NDArray[np.float64]],
    keep: Callable[[], None],
) -> None:
    """Compute a slice, write its result, and record it if nobody has acquired the slice since.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        plan: The round's aggregation plan.
        found: The pass.
        lease: The slice.
        values: Computes the result.
        keep: Called while it is computed; raises to give up.

    Raises:
        LeaseLostError: The slice is no longer this coordinator's; the result was given up.
    """
    inputs = PassInputs.from_json(found.inputs)
    size = inputs.value_count(lease) * ELEMENT_BYTES
    layout = Manifest((TensorSpec(SEAL_NAME, DType.UINT8, (size,)),))
    seal = version_seal_context(
        context, plan.config, plan.training_session_id, plan.base_version + 1, SEAL_NAME
    )
    writer = PayloadWriter(context, executor, layout, context.clock(), seal)
    try:
        for part in values:
            writer.feed(part.astype("<f8", copy=False).tobytes())
            keep()
        _record(context, found, lease, writer.finish())
    except BaseException:
        writer.abandon()
        raise


def _record(context: Context, found: FoldPass, lease: SliceLease, payload: ReceivedPayload) -> None:
    tag = authenticator(
        context, found.inputs, lease.first_element, lease.end_element, payload.digest
    )
    at = context.clock()

    def work(session: Session) -> bool:
        if not fold_slices.lock_current(session, lease):
            return False
        payload.insert(session, at)
        fold_slices.record(session, lease, SliceResult(payload.payload_id, tag))
        return True

    if not context.database.write(work):
        raise LeaseLostError


def read_result(
    context: Context, inputs: bytes, first_element: int, end_element: int, result: SliceResult
) -> Iterator[NDArray[np.float64]]:
    """Return what yields the values of a result, after checking that a coordinator computed it from the inputs.

    Values that belong together (`PassInputs.unit_values`) are in one array. The chunks of a payload in the payload
    store are compared with its digest as they are read.

    Raises:
        DamagedPayloadError: It was altered, or its MAC is not that of these inputs.
        PayloadPrunedError: It is gone.
    """
    with context.database.read() as session:
        stored = describe(payloads.get_payload(session, result.payload_id))
    data = _checked(context, stored)
    try:
        check_equal(
            authenticator(context, inputs, first_element, end_element, stored.digest),
            result.authenticator,
        )
    except UnsealError as error:
        problem = "it is not the result of a coordinator"
        raise DamagedPayloadError(stored.payload_id, problem) from error
    unit_bytes = PassInputs.from_json(inputs).unit_values * ELEMENT_BYTES
    return _values(PayloadBytes(context, stored, data, AHEAD), unit_bytes)


def _checked(context: Context, stored: StoredPayload) -> bytes | None:
    """Return the bytes of a payload in its row after checking them; those of another are checked when they are read."""
    check_digests(stored)
    if not stored.in_row:
        return None
    (data,) = read_range(context, stored, 0, 1)
    if payload_digest([data]) != stored.digest:
        raise DamagedPayloadError(stored.payload_id, "its bytes are not those of its digest")
    return data


def _values(source: PayloadBytes, unit_bytes: int) -> Iterator[NDArray[np.float64]]:
    """Read a result in parts of about a chunk, and of whole units."""
    step = max(1, CHUNK_BYTES // max(1, unit_bytes)) * unit_bytes
    for start in range(0, source.size_bytes, step or CHUNK_BYTES):
        length = min(step, source.size_bytes - start)
        part: NDArray[Any] = np.frombuffer(source.read(start, length), "<f8")
        yield part.astype(np.float64, copy=False)
