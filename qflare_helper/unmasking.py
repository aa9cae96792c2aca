"""Answers to coordinators: verifies a request and its updates, and adds up the masks.

A request passes these checks, in this order, before anything is recorded: the keyset follows from the pinned roots and
is not older than one seen before; request and task are signed by task keys, for this realm, this helper and one round;
the policy allows the training session; every update is signed by a key that a registrar's receipt or a rotation proves
to be its device's, and was masked for exactly this task; no device is twice in the set; every seed opens and was not
used before; there are as many updates as the request says, with the digest that it says, and not too few. In an
asynchronous round an update may be masked for an earlier task, which is signed and has the same masking; its weight is
that of its staleness, whatever the coordinator says (`SumTasks`).

Only then the sum of the masks is computed, the set is recorded, and the answer is sent. If the task wants noise of
helpers, the sum gets discrete Gaussian noise, which is drawn once and recorded with the set. Memory is a slice of a
mask and two kilobytes per update; large sums and the noise are in temporary files.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from google.protobuf.message import DecodeError

from qflare.crypto import merkle
from qflare.crypto.signing import PublicKey
from qflare.crypto.symmetric import UnsealError
from qflare.evidence.device_keys import ProvenKeys
from qflare.evidence.lineage import contributors_digest
from qflare.evidence.statements import (
    StatementError,
    digest_of,
    open_task,
    open_update,
    require_equal,
)
from qflare.evidence.unmasking import (
    Masking,
    SumTasks,
    masking_of,
    open_request,
    sign_answer,
)
from qflare.evidence.verification import follow_keysets
from qflare.masking.masks import SLICE_BYTES, KeyStream, Mask, add_streams
from qflare.masking.noise import DrawNoise, MissingSamplerError, draw_exact, require_sampler
from qflare.masking.seeds import open_seed
from qflare.masking.staleness import Rounding, weigh
from qflare.protocol.constraints import find_violations
from qflare.protocol.keysets import KeyRole, TrustedKeyset
from qflare.tensors import CHUNK_BYTES, Array
from qflare.times import timestamp_of
from qflare.v1 import helper_service_pb2, security_pb2
from qflare_helper.errors import (
    BusyError,
    InvalidRequestError,
    NoiseUnavailableError,
    OverlapError,
    PolicyError,
    RefusedMembersError,
    RolledBackError,
    SmallCohortError,
    UntrustedKeysetError,
)
from qflare_helper.identity import HelperIdentity
from qflare_helper.known_keys import KnownKeys
from qflare_helper.ledger import AnsweredSet, Ledger, LedgerMember
from qflare_helper.policy import Policy, read_policy
from qflare_helper.receipts import VerifiedReceipts

MAX_REFUSED: Final = 1000
"""Most refused updates that a response names; the others are named when the request is repeated."""

MAX_EARLIER_TASKS: Final = 1024
"""Most earlier tasks of a request."""

MAX_STREAMS: Final = 4096
"""Most key streams that are kept open while a sum is made, 1.5 KB each; those of further updates are opened for each
slice."""

MEMORY_BYTES: Final = 8 * 2**20
"""Largest sum that is kept in memory until it is sent."""

_SEED_TAG: Final = b"qflare/v1/used-seed"

Member = helper_service_pb2.UnmaskMember
Envelope = security_pb2.SignedEnvelope
Clock = Callable[[], datetime]
"""Returns the time in UTC."""


def utc_now() -> datetime:
    """Return the time of this machine."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class _Opened:
    """A verified update of a set."""

    update_id: str
    device_id: str
    digest: str
    counts: bool
    weight: int
    seed: bytes | None
    problem: str = ""

    def ledger_member(self) -> LedgerMember:
        assert self.seed is not None
        digest = hashlib.sha256(_SEED_TAG + self.seed).digest()
        return LedgerMember(self.update_id, self.device_id, digest)


@dataclass(frozen=True)
class Answer:
    """A signed answer, the latest one of this helper, and the sum of the masks in chunks."""

    envelope: security_pb2.SignedEnvelope
    latest: security_pb2.SignedEnvelope
    chunks: Iterator[bytes]


class Devices:
    """What is remembered of devices from round to round. Thread-safe."""

    def __init__(self) -> None:
        self.receipts = VerifiedReceipts()
        self.keys = KnownKeys()


class Unmasking:
    """Answers requests. Thread-safe.

    Args:
        identity: Keys of the helper.
        ledger: Its ledger.
        folder: Folder of its policy and of temporary files.
        max_vector_bytes: Largest masked update.
        clock: Returns the time; only a simulation replaces it.
        draw_noise: Draws noise; only a simulation replaces it.
    """

    def __init__(
        self,
        identity: HelperIdentity,
        ledger: Ledger,
        folder: Path,
        max_vector_bytes: int,
        clock: Clock = utc_now,
        draw_noise: DrawNoise = draw_exact,
    ) -> None:
        self._identity = identity
        self._ledger = ledger
        self._folder = folder
        self._max_vector_bytes = max_vector_bytes
        self._clock = clock
        self._draw_noise = draw_noise
        self._devices = Devices()

    def open(self, header: helper_service_pb2.UnmaskHeader) -> "Call":
        """Verify the first part of a request: it is a coordinator's, and this helper's policy allows it.

        Raises:
            HelperError: A subclass: it is refused.
        """
        policy = read_policy(self._folder)
        call = Call(self._identity, self._ledger, policy, self._devices, header, self._clock())
        with self._ledger.held():
            call.check_header()
        if call.masking.helper_noise and self._draw_noise is draw_exact:
            _require_sampler()
        return call

    def answer(self, call: "Call", parts: Iterator[Member | Envelope]) -> Answer | None:
        """Answer a request; None for a request that is only checked.

        Args:
            call: The verified first part of the request.
            parts: The earlier tasks and then the updates, consumed once.

        Raises:
            HelperError: A subclass: it is refused.
        """
        opened = call.open_members(parts)
        with self._ledger.held():
            return self._answer(call, opened)

    def _answer(self, call: "Call", opened: Sequence["_Opened"]) -> Answer | None:
        call.refuse_unusable(opened)
        size_bytes = call.size_bytes
        if size_bytes > self._max_vector_bytes:
            raise PolicyError(
                f"masked updates have {size_bytes} bytes, want at most {self._max_vector_bytes}"
            )
        if call.is_check:
            return None
        with ExitStack() as files:
            noise = None
            if call.masking.helper_noise:
                noise = files.enter_context(tempfile.TemporaryFile(dir=self._folder))
                self._write_noise(call, noise)
            file = files.enter_context(self._room(size_bytes))
            digest = _add_masks(call.mask_sum(opened), size_bytes, noise, file)
            envelope = call.record(opened, digest, noise)
            latest = self._ledger.latest()
            if noise is not None:
                noise.close()
            files.pop_all()
        return Answer(envelope, latest or envelope, _chunks(file))

    def _room(self, size_bytes: int) -> BinaryIO:
        """Return where a sum is kept until it is sent: memory if it is small, else a file."""
        if size_bytes <= MEMORY_BYTES:
            return BytesIO()
        return tempfile.TemporaryFile(dir=self._folder)

    def _write_noise(self, call: "Call", file: BinaryIO) -> None:
        """Write the noise of a set to a file: what was recorded with its answer, or new noise."""
        if self._ledger.find(call.wanted) is None:
            _draw_to(file, call, self._draw_noise)
            return
        for index in range(-(-call.size_bytes // CHUNK_BYTES)):
            chunk = self._ledger.noise(call.wanted, index)
            if chunk is None:
                raise NoiseUnavailableError(
                    "the set was answered, and its noise was deleted with the answer for a later round"
                )
            file.write(chunk)


class Call:
    """One request being checked."""

    masking: Masking
    size_bytes: int

    def __init__(
        self,
        identity: HelperIdentity,
        ledger: Ledger,
        policy: Policy,
        devices: "Devices",
        header: helper_service_pb2.UnmaskHeader,
        at: datetime,
    ) -> None:
        self._identity = identity
        self._ledger = ledger
        self._policy = policy
        self._devices = devices
        self._header = header
        self._at = at
        self.size_bytes = 0

    @property
    def is_check(self) -> bool:
        """Whether no answer is wanted."""
        return self._header.check_only

    def check_header(self) -> None:
        """Check keyset, request, task and policy."""
        trusted, ever = self._follow()
        realm = self._identity.pinned.realm
        try:
            task_keys = trusted.signature_keys(KeyRole.TASK, self._at)
            self._request = open_request(self._header.request, task_keys, realm)
            task = open_task(self._header.task, ever[KeyRole.TASK], realm)
            masking = masking_of(self._header.task)
            if masking is None:
                raise StatementError("the task requires no masking")
            require_equal("task_digest", self._request.task_digest, masking.task_digest)
            require_equal("helper_id", self._request.helper_id, self._identity.helper_id)
            for field in ("training_session_id", "round_number"):
                require_equal(field, getattr(self._request, field), getattr(task, field))
        except (ValueError, DecodeError) as error:
            raise InvalidRequestError(f"request: {error}"[:300]) from error
        _check_constraints(self._request)
        self.masking = masking
        self._tasks = SumTasks(task, masking)
        self._task_keys = ever[KeyRole.TASK]
        self._earlier_count = 0
        self._registrars = ever[KeyRole.REGISTRAR]
        self._policy.require_session(task.training_session_id)
        self._policy.require_noise(masking.noise_multiplier)
        self._require_place()
        self._require_counter()

    def _follow(self) -> tuple[TrustedKeyset, dict[KeyRole, tuple[PublicKey, ...]]]:
        """Verify the keysets from the pinned roots to the one in force."""
        header = self._header
        try:
            trusted, ever = follow_keysets(
                TrustedKeyset.bootstrap(self._identity.pinned),
                header.earlier_keysets,
                header.keyset,
                self._at,
            )
        except (ValueError, DecodeError) as error:
            raise UntrustedKeysetError(f"keyset: {error}"[:300]) from error
        digest = digest_of(header.keyset.keyset.payload)
        if not self._ledger.require_keyset(trusted.keyset_version, digest):
            raise UntrustedKeysetError("keyset: it is older than one that was seen before")
        return trusted, ever

    def _require_place(self) -> None:
        """Find this helper among those of the task."""
        ids = [helper.helper_id for helper in self.masking.helpers]
        if self._identity.helper_id not in ids:
            raise InvalidRequestError("the task names other helpers")
        self._place = ids.index(self._identity.helper_id)

    def _require_counter(self) -> None:
        counter = self._ledger.counter()
        if self._request.last_counter > counter:
            raise RolledBackError(
                f"this helper has given {counter} answers, and the coordinator has seen "
                f"{self._request.last_counter}: its database was restored from a backup"
            )

    def _add_task(self, envelope: Envelope) -> None:
        """Verify an earlier task."""
        self._earlier_count += 1
        if self._earlier_count > MAX_EARLIER_TASKS:
            raise InvalidRequestError(f"there are more than {MAX_EARLIER_TASKS} earlier tasks")
        try:
            open_task(envelope, self._task_keys, self._identity.pinned.realm)
            self._tasks.add_earlier(envelope)
        except (ValueError, DecodeError) as error:
            raise InvalidRequestError(f"earlier task: {error}"[:300]) from error

    def open_members(self, parts: Iterator[Member | Envelope]) -> list[_Opened]:
        """Verify earlier tasks and updates, and open the seeds of these.

        Raises:
            InvalidRequestError: An update does not verify, or the set is not the requested one.
            SmallCohortError: There are too few.
            OverlapError: A device is twice in the set.
        """
        opened: list[_Opened] = []
        for part in parts:
            if isinstance(part, Envelope):
                self._add_task(part)
                continue
            opened.append(self._open(part))
            if len(opened) > self._request.member_count:
                raise InvalidRequestError("there are more updates than the request says")
        self._check_set(opened)
        return opened

    def _check_set(self, opened: Sequence[_Opened]) -> None:
        try:
            digest = contributors_digest(item.digest for item in opened)
        except StatementError as error:
            raise InvalidRequestError(str(error)) from error
        wanted = (self._request.member_count, self._request.members_digest)
        if (len(opened), digest) != wanted:
            raise InvalidRequestError("the updates are not those of the request")
        if self._request.weights_digest != self._weights_digest(opened):
            raise InvalidRequestError("the request states other weights of the updates")
        least = max(self._policy.min_cohort, self._tasks.min_cohort)
        if sum(item.counts for item in opened) < least:
            raise SmallCohortError(
                f"{sum(item.counts for item in opened)} counted updates, want at least {least}"
            )
        if len(opened) > self.masking.parameters.max_cohort:
            raise InvalidRequestError(
                "there are more updates than the task allows: a sum would wrap"
            )
        for field in ("device_id", "update_id"):
            if len({getattr(item, field) for item in opened}) != len(opened):
                raise OverlapError(f"{field} is twice in the set")

    def _weights_digest(self, opened: Sequence[_Opened]) -> str:
        return self._tasks.digest_of_weights((item.digest, item.weight) for item in opened)

    def refuse_unusable(self, opened: Sequence[_Opened]) -> None:
        """Refuse a verified set with seeds that cannot be used.

        Raises:
            RefusedMembersError: It has some.
        """
        reasons = {item.update_id: item.problem for item in opened if item.problem}
        usable = [item.ledger_member() for item in opened if item.seed is not None]
        reused = "its seed was used for another update"
        reasons |= dict.fromkeys(self._ledger.used_seeds(usable), reused)
        seen: set[bytes] = set()
        for member in usable:
            if member.seed_hash in seen:
                reasons.setdefault(member.update_id, reused)
            seen.add(member.seed_hash)
        if reasons:
            raise RefusedMembersError(dict(list(reasons.items())[:MAX_REFUSED]))

    def _open(self, member: Member) -> _Opened:
        """Verify one update; a seed that does not open is its problem, everything else the coordinator's."""
        try:
            stated = security_pb2.UpdateStatement.FromString(member.statement.payload)
            keys, shown = self._device_keys(member)
            statement = open_update(member.statement, keys.get(stated.device_id, stated.key_id))
            _check_constraints(statement)
            weight = self._tasks.weight_of(statement)
            self._require_size(statement.size_bytes)
        except (ValueError, DecodeError) as error:
            raise InvalidRequestError(f"update: {error}"[:300]) from error
        counts = self._policy.counts(shown)
        digest = digest_of(member.statement.payload)
        return self._with_seed(statement, digest, weight, counts=counts)

    def _device_keys(self, member: Member) -> tuple[ProvenKeys, list[str]]:
        """Prove the keys of a device; return them with their ids."""
        realm, devices = self._identity.pinned.realm, self._devices
        keys = ProvenKeys(realm, self._registrars, devices.receipts.open, devices.keys.read)
        device_ids = {evidence.device_id for evidence in member.device_keys}
        if len(device_ids) != 1:
            raise StatementError("an update comes with keys of no device, or of several")
        return keys, [keys.add(evidence).key.key_id for evidence in member.device_keys]

    def _require_size(self, size_bytes: int) -> None:
        self.size_bytes = self.size_bytes or size_bytes
        require_equal("size_bytes", size_bytes, self.size_bytes)
        if size_bytes < 1 or size_bytes % self.masking.parameters.itemsize:
            raise StatementError("size_bytes is not that of a masked update")
        if self.element_count < 0:
            raise StatementError("size_bytes has no room for the slots")

    def _with_seed(
        self, statement: security_pb2.UpdateStatement, digest: str, weight: int, *, counts: bool
    ) -> _Opened:
        sealed = statement.masking.seeds[self._place]
        key = self._identity.kem_keys.get(sealed.kem_key_id)
        seed, problem = None, ""
        try:
            if key is None:
                problem = "its seed is sealed to a key that this helper no longer has"
            else:
                seed = open_seed(sealed, key, statement)
        except UnsealError:
            problem = "its seed does not open, or belongs to another update"
        names = statement.update_id, statement.device_id, digest
        return _Opened(*names, counts, weight, seed, problem)

    def mask_sum(self, opened: Sequence[_Opened]) -> "_MaskSum":
        """Return the sum of the masks of a verified set."""
        ordered = sorted(opened, key=lambda item: item.update_id)
        seeds = [(item.seed, item.weight) for item in ordered if item.seed is not None]
        parameters, rounding = self.masking.parameters, None
        if parameters.staleness_weights:
            largest = parameters.largest_staleness_weight
            rounding = Rounding(largest, self.element_count, seeds)
        return _MaskSum(seeds, self.size_bytes, self.element_count, parameters.dtype, rounding)

    @property
    def element_count(self) -> int:
        """Elements of the model in a masked update."""
        parameters = self.masking.parameters
        return self.size_bytes // parameters.itemsize - parameters.slot_count

    @property
    def wanted(self) -> AnsweredSet:
        """The set of the request."""
        request = self._request
        return AnsweredSet(
            request.training_session_id,
            request.round_number,
            request.task_digest,
            request.members_digest,
        )

    def record(
        self, opened: Sequence[_Opened], mask_digest: str, noise: BinaryIO | None
    ) -> security_pb2.SignedEnvelope:
        """Record the set with its noise and return its answer, the earlier one if it was answered before.

        Raises:
            BusyError: It was answered just now with other noise.
        """
        request = self._request

        def sign(counter: int, previous_digest: str) -> security_pb2.SignedEnvelope:
            answer = security_pb2.UnmaskingAnswer(
                realm=request.realm,
                training_session_id=request.training_session_id,
                round_number=request.round_number,
                helper_id=request.helper_id,
                task_digest=request.task_digest,
                members_digest=request.members_digest,
                member_count=request.member_count,
                bits=self.masking.parameters.bits,
                size_bytes=self.size_bytes,
                mask_digest=mask_digest,
                counter=counter,
                previous_digest=previous_digest,
                counted_member_count=sum(item.counts for item in opened),
                noise_multiplier=self.masking.helper_noise,
                weights_digest=request.weights_digest,
                create_time=timestamp_of(self._at),
            )
            return sign_answer(self._identity.signing, answer)

        members = [item.ledger_member() for item in opened]
        envelope = self._ledger.record(self.wanted, members, sign, _read(noise))
        answer = security_pb2.UnmaskingAnswer.FromString(envelope.payload)
        if noise is not None and answer.mask_digest != mask_digest:
            raise BusyError("the same set was answered at the same time; repeat the request")
        return envelope


def _check_constraints(
    message: security_pb2.UpdateStatement | security_pb2.UnmaskingRequest,
) -> None:
    for violation in find_violations(message):
        raise InvalidRequestError(f"{violation.field}: {violation.description}"[:300])


def _require_sampler() -> None:
    try:
        require_sampler()
    except MissingSamplerError as error:
        raise NoiseUnavailableError(str(error)) from error


def _draw_to(file: BinaryIO, call: Call, draw: DrawNoise) -> None:
    """Write new noise for the sum of a call: for each element of the model, and zeros for the slots."""
    parameters, count = call.masking.parameters, call.element_count
    stddev, step = parameters.noise_stddev(count), CHUNK_BYTES // parameters.itemsize
    for start in range(0, count, step):
        samples = draw(min(step, count - start), stddev)
        file.write(samples.astype(parameters.dtype).tobytes())
    file.write(bytes(call.size_bytes - count * parameters.itemsize))


def _read(noise: BinaryIO | None) -> Iterator[bytes]:
    """Yield the chunks of a file with noise; none without one."""
    if noise is not None:
        noise.seek(0)
        while chunk := noise.read(CHUNK_BYTES):
            yield chunk


def _add_masks(total: "_MaskSum", size_bytes: int, noise: BinaryIO | None, file: BinaryIO) -> str:
    """Write the sum of the masks and the noise to a file; return the Merkle root over its chunks."""
    tree, added = merkle.CompactTree(), _read(noise)
    for offset in range(0, size_bytes, CHUNK_BYTES):
        chunk = total.next(min(CHUNK_BYTES, size_bytes - offset), next(added, b""))
        tree.append(merkle.leaf_hash(chunk))
        file.write(chunk)
    file.seek(0)
    return tree.root().hex()


class _MaskSum:
    """Sum of masks, each with the staleness weight of its update, minus the rounding of an asynchronous round.

    Args:
        seeds: Seeds with weights.
        size_bytes: Of a masked update.
        element_count: Elements of a masked update before its slots, which weights and rounding leave alone.
        dtype: Of the ring.
        rounding: None in rounds that are not asynchronous.
    """

    def __init__(
        self,
        seeds: Sequence[tuple[bytes, int]],
        size_bytes: int,
        element_count: int,
        dtype: np.dtype[np.unsignedinteger],
        rounding: Rounding | None,
    ) -> None:
        self._streams: dict[int, list[KeyStream]] = {}
        self._others: dict[int, list[Mask]] = {}
        for index, (seed, weight) in enumerate(seeds):
            mask = Mask(seed)
            if index < MAX_STREAMS:
                self._streams.setdefault(weight, []).append(mask.stream(size_bytes))
            else:
                self._others.setdefault(weight, []).append(mask)
        self._first = 0
        self._element_count = element_count
        self._dtype = dtype
        self._rounding = rounding

    def next(self, length: int, noise: bytes = b"") -> memoryview:
        """Return the next bytes of the sum and of noise of the same length, if any; they stay in cache for all masks.

        Args:
            length: A whole number of elements, at most `CHUNK_BYTES`.
            noise: Of the same length; empty for none.
        """
        total = np.zeros(length // self._dtype.itemsize, self._dtype)
        if noise:
            total += np.frombuffer(noise, self._dtype)
        step = SLICE_BYTES // self._dtype.itemsize
        for start in range(0, len(total), step):
            part = total[start : start + step]
            self._add_to(part, self._first)
            self._first += len(part)
        return total.data.cast("B")

    def _add_to(self, part: Array, first: int) -> None:
        for weight in sorted(self._streams.keys() | self._others.keys()):
            same = np.zeros_like(part) if weight > 1 else part
            add_streams(self._streams.get(weight, ()), same)
            for mask in self._others.get(weight, ()):
                mask.add_to(same, first)
            if weight > 1:
                weigh(same, first, self._element_count, weight)
                np.add(part, same, out=part)
        if self._rounding is not None:
            self._rounding.subtract_from(part, first)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
