"""Rounds with secure aggregation and a helper, beside the same rounds without it."""

import contextlib
import io
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from qflare.evidence.unmasking import Masking, masking_of
from qflare.masking.masks import SLICE_BYTES, Mask, new_buffer, new_seed
from qflare.tensors import Array, Manifest
from qflare.v1 import training_pb2
from qflare_client import Client, GlobalModel
from qflare_client.models.masked_update import (
    QuantizedUpdate,
    add_masks,
    quantize_update,
    seal_seeds,
)
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.devices import Model, ask_task, signed, statement_of, submission, submissions
from tests.bench.figures import MB, Figure, megabytes, milliseconds
from tests.bench.handshakes import bundle_of
from tests.bench.load import Call, closed_loop
from tests.bench.population import BenchDevice
from tests.bench.process import cpu_of, peak_of
from tests.bench.rounds import sdk_devices
from tests.support.helpers import HelperProcess
from tests.support.line import Line

DEVICES: Final = 100
DROPPED: Final = 10
BATCH: Final = 10
"""Updates that are made ready together."""
IN_FLIGHT: Final = 4
CLIPS: Final = {32: 100.0, 16: 2.0}
"""Norms to which changes are clipped, by the bits of an element; those of the bench are up to 1.6 long."""
DEVICE_GOAL_S: Final = 0.03
UPLOAD_GOAL: Final = 1500
COORDINATOR_GOAL_S: Final = 0.1
HELPER_GOAL_S: Final = 0.15
MEMORY_GOAL: Final = 16 * MB
LOOK_S: Final = 0.05
"""Time between two looks for a version. More would be counted as the coordinator's work, and more so in rounds with a
helper, which take longer to close."""


@dataclass(frozen=True)
class Secured:
    """A coordinator with a helper."""

    coordinator: Coordinator
    helper: HelperProcess

    def session(
        self,
        model: Model,
        target: int,
        round_count: int,
        *,
        masked: bool = True,
        bits: int = 32,
        half_base: bool = False,
    ) -> str:
        """Start a training session whose rounds close with so many updates; devices may get its versions as float16."""
        config = training_pb2.TrainingConfig(
            total_rounds=round_count, rounds=training_pb2.RoundPolicy(quorum=target)
        )
        if half_base:
            config.transfer.download_encoding = training_pb2.ENCODING_FLOAT16
        if masked:
            config.safeguards.max_example_count = 1000
            config.secure_aggregation.mode = training_pb2.SECURE_AGGREGATION_MODE_HELPER
            config.secure_aggregation.bits = bits
            config.secure_aggregation.clip = CLIPS[bits]
            config.secure_aggregation.helpers.append(self.helper.helper_id)
        return self.coordinator.admin.start_session(model.manifest, model.payload, config)


@contextlib.contextmanager
def secured(lab: Laboratory) -> Iterator[Secured]:
    """Run a coordinator on SQLite and a helper."""
    with lab.temporary() as folder:
        bundles = folder / "helpers"
        bundles.mkdir()
        settings = {"QFLARE_HELPER_DIR": str(bundles)}
        with lab.coordinator(Backend.SQLITE, settings) as coordinator:
            with contextlib.redirect_stdout(io.StringIO()):
                helper = HelperProcess(folder / "helper", bundle_of(coordinator), bundles)
            helper.start()
            try:
                yield Secured(coordinator, helper)
            finally:
                helper.stop()


@dataclass(frozen=True)
class MaskedModel(Model):
    """A masked update: random bytes, in another layout than the model's."""

    layout: Manifest
    content: bytes

    @cached_property
    def manifest(self) -> Manifest:
        """Its layout."""
        return self.layout

    @cached_property
    def payload(self) -> bytes:
        """Its bytes."""
        return self.content


def _quantized(masking: Masking, model: Model) -> QuantizedUpdate:
    """Return an update that adds a thousandth to every element."""
    base = {"weights": np.frombuffer(model.payload, np.float32)}
    arrays = {"weights": base["weights"] + np.float32(0.001)}
    return quantize_update(masking, model.manifest, arrays, base, 100, {})


def _masked_submissions(
    secured: Secured, session_id: str, devices: Sequence[BenchDevice], model: Model
) -> Iterator[list[Call]]:
    """Yield a masked update of each device for the open round, some at a time, each with a mask of its own."""
    task = ask_task(secured.coordinator, devices[0], session_id)
    masking = masking_of(task.task)
    assert masking is not None
    quantized = _quantized(masking, model)
    realm = secured.coordinator.config.realm
    for start in range(0, len(devices), BATCH):
        calls = []
        for device in devices[start : start + BATCH]:
            own = QuantizedUpdate(quantized.layout, quantized.vector.copy())
            seeds = add_masks(masking, own)
            sent = MaskedModel(own.vector.nbytes, own.layout, own.vector.tobytes())
            statement = statement_of(realm, task, device, sent)
            seal_seeds(masking, seeds, statement)
            calls.append(submission(signed(statement, device), device, sent))
        yield calls


def _plain_submissions(
    secured: Secured, session_id: str, devices: Sequence[BenchDevice], model: Model
) -> Iterator[list[Call]]:
    """Yield an update of each device for the open round, some at a time."""
    for start in range(0, len(devices), BATCH):
        chosen = devices[start : start + BATCH]
        yield submissions(secured.coordinator, session_id, chosen, model)


@dataclass(frozen=True)
class Spent:
    """CPU time of a round, in seconds."""

    coordinator_s: float
    helper_s: float


def _round(
    secured: Secured, session_id: str, devices: Sequence[BenchDevice], model: Model, *, masked: bool
) -> Spent:
    """Let devices take part in the open round, and return what it takes up to the version and after it.

    Updates with masks and without are made ready and sent in the same portions.
    """
    coordinator, helper = secured.coordinator, secured.helper
    version = coordinator.admin.current_version(session_id)
    coordinator.process.settle()
    before = coordinator.process.cpu_s(), cpu_of(helper.pid)
    ready = _masked_submissions if masked else _plain_submissions
    for calls in ready(secured, session_id, devices, model):
        closed_loop(coordinator.address, calls, IN_FLIGHT)
    coordinator.admin.await_version(session_id, version + 1, every_s=LOOK_S)
    coordinator.process.settle()
    after = coordinator.process.cpu_s(), cpu_of(helper.pid)
    return Spent(after[0] - before[0], after[1] - before[1])


def helper_rounds(lab: Laboratory) -> Iterator[Figure]:
    """Rounds of 100 devices of which 10 drop out, with masks and without in turns, and the memory that they take.

    What masks cost the coordinator is the median difference of two rounds that follow each other: the machine is faster
    or slower from one minute to the next.
    """
    count, model = lab.times(DEVICES, 40), Model(4 * MB)
    repeats = lab.times(8, 4)
    with secured(lab) as made:
        devices = made.coordinator.population.devices(count - count // DROPPED)
        yield from _memory(made, devices, model)
        ids = {
            masked: made.session(model, len(devices), repeats + 1, masked=masked)
            for masked in (False, True)
        }
        spent: dict[bool, list[Spent]] = {False: [], True: []}
        for number in range(repeats + 1):
            for masked in sorted(ids, reverse=number % 2 == 1):  # neither always follows the other
                one = _round(made, ids[masked], devices, model, masked=masked)
                if number:  # the first ones fill memory and caches
                    spent[masked].append(one)
    more = sorted(
        with_masks.coordinator_s - without.coordinator_s
        for without, with_masks in zip(spent[False], spent[True], strict=True)
    )
    more_s = statistics.median(more)
    plain_s = statistics.median(one.coordinator_s for one in spent[False])
    helper_s = statistics.median(one.helper_s for one in spent[True])
    what = f"round of {count} x 4 MB, {count // DROPPED} dropped out, SQLite"
    is_whole = not lab.quick
    yield Figure(
        f"CPU of the coordinator for masks and a helper, {what}",
        f"{_more(more_s)} ({repeats} pairs: {_more(more[0])} to {_more(more[-1])})",
        f"without masks: {milliseconds(plain_s)}",
        f"{1 + more_s / plain_s:.2f} x",
        f"<= {milliseconds(COORDINATOR_GOAL_S)} more" if is_whole else "",
        more_s <= COORDINATOR_GOAL_S if is_whole else None,
    )
    streams_s = _key_streams(len(devices), model.size_bytes)
    yield Figure(
        f"CPU of the helper, {what}",
        milliseconds(helper_s),
        f"{len(devices)} key streams alone: {milliseconds(streams_s)}",
        f"{helper_s / streams_s:.1f} x",
        f"<= {milliseconds(HELPER_GOAL_S)}" if is_whole else "",
        helper_s <= HELPER_GOAL_S if is_whole else None,
    )


def _more(seconds: float) -> str:
    """Write a difference that may be negative."""
    return f"{milliseconds(abs(seconds))} {'less' if seconds < 0 else 'more'}"


def _memory(made: Secured, devices: Sequence[BenchDevice], model: Model) -> Iterator[Figure]:
    """Compare the memory of a round of all devices with that of a tenth; an earlier round has loaded all code."""
    peaks = []
    few = devices[: len(devices) // 10]
    _round(made, made.session(model, len(few), 1), few, model, masked=True)
    for cohort in (few, devices):
        _round(made, made.session(model, len(cohort), 1), cohort, model, masked=True)
        peaks.append((made.coordinator.process.peak_bytes(), peak_of(made.helper.pid)))
    for name, first, last in zip(("coordinator", "helper"), *peaks, strict=True):
        yield Figure(
            f"peak memory of the {name}, round of {len(devices)} masked updates of 4 MB",
            megabytes(last),
            f"of {len(few)}: {megabytes(first)}",
            f"{last / first:.2f} x",
            f"<= {megabytes(MEMORY_GOAL)} more",
            last - first <= MEMORY_GOAL,
        )


def _key_streams(count: int, size_bytes: int) -> float:
    """Return the CPU seconds of so many key streams."""
    masks, buffer = [Mask(new_seed()) for _ in range(count)], new_buffer()
    begun = time.process_time()
    for mask in masks:
        stream = mask.stream(size_bytes)
        for offset in range(0, size_bytes, SLICE_BYTES):
            stream.write_to(buffer, min(SLICE_BYTES, size_bytes - offset))
    return time.process_time() - begun


def masked_devices(lab: Laboratory) -> Iterator[Figure]:
    """What a device spends on an update of 10 MB, with a mask and without in turns, with the SDK."""
    model, repeats = Model(lab.times(10, 2) * MB), lab.times(9, 3)
    with secured(lab) as made, lab.temporary() as folder:
        client = sdk_devices(made.coordinator, folder, 2)[0]
        ids = {
            masked: [made.session(model, 2, 1, masked=masked) for _ in range(repeats + 1)]
            for masked in (False, True)
        }
        spent: dict[bool, list[float]] = {False: [], True: []}
        for number in range(repeats):
            for masked in (False, True):
                spent[masked].append(_submit(client, ids[masked][number]))
        client.close()
        with (
            Line(made.coordinator.address) as line,
            Client(home=folder / "device-0", address=line.address) as moved,
        ):
            carried = [_uploaded(moved, line, ids[masked][-1]) for masked in (False, True)]
    extra_s = statistics.median(spent[True]) - statistics.median(spent[False])
    streams_s = 2 * min(_key_streams(1, model.size_bytes) for _ in range(5))
    size, is_whole = f"{model.size_bytes // MB} MB", not lab.quick
    yield Figure(
        f"CPU of a device to mask an update of {size}, one helper",
        f"{milliseconds(extra_s)} more",
        f"two key streams alone: {milliseconds(streams_s)}; the update without a mask: "
        + milliseconds(statistics.median(spent[False])),
        f"{extra_s / streams_s:.1f} x",
        f"<= {milliseconds(DEVICE_GOAL_S)} more" if is_whole else "",
        extra_s <= DEVICE_GOAL_S if is_whole else None,
    )
    yield Figure(
        f"upload of a masked update of {size}, one helper",
        f"{carried[1] - carried[0]:,} bytes more",
        f"without a mask: {carried[0]:,} bytes",
        goal=f"<= {UPLOAD_GOAL:,} bytes more",
        reached=carried[1] - carried[0] <= UPLOAD_GOAL,
    )


def _submit(client: Client, session_id: str) -> float:
    """Return the CPU seconds of an update."""
    task = client.get_task(session_id)
    base = client.download_base(task)
    arrays = trained(base)
    begun = time.process_time()
    client.submit(task, base, arrays, 100)
    return time.process_time() - begun


def trained(base: GlobalModel) -> dict[str, Array]:
    """Return weights that differ from a version's by a thousandth."""
    return {name: values + np.float32(0.001) for name, values in base.arrays.items()}


def _uploaded(client: Client, line: Line, session_id: str) -> int:
    """Return the bytes of an update on the wire."""
    task = client.get_task(session_id)
    base = client.download_base(task)
    arrays = trained(base)
    before = line.up_bytes
    client.submit(task, base, arrays, 100)
    return line.up_bytes - before
