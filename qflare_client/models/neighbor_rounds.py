"""The device's part in secure aggregation with neighbors: steps of a round, and the masks of its update.

What a device answers follows from its state alone, and the state is written durably before the answer is sent: after a
crash the device sends the same bytes again. One state per training session is kept, that of the latest round.

Invariants: in a round a device belongs to one roster, masks one update, confirms one set of updates, and reveals one
share of each neighbor's secrets, for that set. It confirms only a set that holds its own update, is as large as its
task promises, and leaves no part of the group's graph alone; it reveals only if enough neighbors have confirmed the
same set. A coordinator that shows anything else gets no answer, whatever it says later. A copied or restored key store
does not know what was done since, so it leaves the round.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto import merkle
from qflare.crypto.signing import PublicKey, Signer, algorithm_of
from qflare.evidence.device_keys import ProvenKeys
from qflare.evidence.neighbors import (
    NONCE_BYTES,
    MaskedRound,
    Member,
    NeighborStatement,
    boxes_tree,
    check_box_proof,
    check_survivors,
    count_confirmations,
    open_advertisement,
    open_shares,
    sharers_digest,
    sign_neighbor_statement,
    survivors_digest,
)
from qflare.evidence.statements import StatementError, digest_of, require_equal
from qflare.evidence.unmasking import Masking
from qflare.masking.neighbor_graph import NeighborGraph
from qflare.masking.neighbors import (
    MemberSecrets,
    NeighborError,
    NotEnoughSharesError,
    OpenedBox,
    Shares,
)
from qflare.tensors import Array
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.errors import InvalidStatementError, KeyStoreError, RepeatedTaskError
from qflare_client.keystore.identity import Identity
from qflare_client.keystore.store import KeyStore
from qflare_client.rpc.caller import Calls
from qflare_client.trust.keyset import Trust

_PREFIX: Final = "neighbors-"


@dataclass
class _State:
    """What a device has done in a round; bytes are in hex."""

    round_number: int
    task_digest: str
    secrets: str = field(repr=False)
    advertisement: str
    roster: list[str] = field(default_factory=list)
    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: str = ""
    sharers: list[str] = field(default_factory=list)
    opened: dict[str, list[str]] = field(default_factory=dict, repr=False)
    has_masked: bool = False
    update_digest: str = ""
    survivors: list[str] = field(default_factory=list)
    confirmation: str = ""
    reveal: str = field(default="", repr=False)
    place: int = 0  # states of releases that did not write it count as copied

    @property
    def own(self) -> str:
        """Digest of the device's advertisement."""
        return digest_of(self.envelope(self.advertisement).payload)

    @staticmethod
    def envelope(data: str) -> security_pb2.SignedEnvelope:
        """Read an envelope."""
        return security_pb2.SignedEnvelope.FromString(bytes.fromhex(data))

    def entries(self, items: Sequence[str]) -> dict[str, str]:
        """Return a list with an entry for each member as a mapping of those that have one."""
        return {member: item for member, item in zip(self.roster, items, strict=True) if item}


class GroupAbandonedError(Exception):
    """The group of this device cannot be completed with it, through no fault of the coordinator."""


class StateStore(Protocol):
    """Where a device keeps its states; a `KeyStore` is one."""

    @property
    def home(self) -> Path:
        """Folder that messages name."""

    @property
    def place(self) -> int:
        """Number that a copy does not have."""

    def read_secret(self, name: str, /) -> bytes | None:
        """Return the content of a file; None if there is none."""

    def write_secret(self, name: str, secret: bytes, /) -> None:
        """Write a file, durably and at once."""

    def delete(self, name: str, /) -> None:
        """Delete a file if it exists."""


class Registrars(Protocol):
    """Knows the keys that sign receipts of devices; `Trust` does."""

    def registrar_keys(
        self, signers: Collection[str], earlier_keysets: Sequence[security_pb2.SignedEnvelope]
    ) -> Sequence[PublicKey]:
        """Return the keys that have ever signed receipts."""


class Author(NamedTuple):
    """Who states what a device sends.

    Attributes:
        realm: Name of the deployment.
        device_id: The device.
        key: Its signature key.
    """

    realm: str
    device_id: str
    key: Signer

    @classmethod
    def of(cls, identity: Identity) -> "Author":
        """Return an enrolled device."""
        return cls(identity.realm, identity.device_id, identity.keys.signing)


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now


class Sources(NamedTuple):
    """Where a device takes random bytes and the time from; only a simulation replaces them.

    Attributes:
        draw: Returns as many random bytes as are asked for.
        clock: Returns the time.
    """

    draw: Callable[[int], bytes] = os.urandom
    clock: Callable[[], Timestamp] = _now


SYSTEM: Final = Sources()


class NeighborMember:
    """A device in rounds with neighbors, without the calls that carry its steps.

    Thread-safe for different training sessions.

    Args:
        store: Keeps its states.
        registrars: Vouch for the keys of its neighbors.
        author: Returns the device with the key that the coordinator accepts.
        sources: Of random bytes and time.
    """

    def __init__(
        self,
        store: StateStore,
        registrars: Registrars,
        author: Callable[[], Author],
        sources: Sources = SYSTEM,
    ) -> None:
        self._store = store
        self._registrars = registrars
        self._author = author
        self._sources = sources

    def make_step(
        self,
        answer: messages.GetTaskResponse,
        masking: Masking,
        more: Callable[[int], messages.NeighborView] | None = None,
    ) -> messages.SecureAggregationStepRequest:
        """Return what the device sends for the step that a verified task asks for, and remember it.

        Args:
            answer: Of kind ADVERTISE, SHARE, CONFIRM or REVEAL.
            masking: Of its signed task, which the device's policy allows.
            more: Returns the neighbors after a number of them; None if the answer shows all.

        Raises:
            GroupAbandonedError: A neighbor does not keep the protocol.
            InvalidStatementError: What the coordinator shows does not verify, or contradicts what it showed before.
            KeyStoreError: The device's state cannot be written.
        """
        step = self._step(answer, masking)
        step.more = more
        with _checked():
            return _STEPS[answer.kind](step)

    def _step(self, answer: messages.GetTaskResponse, masking: Masking) -> "_Step":
        return _Step(self._store, self._registrars, self._author(), self._sources, answer, masking)

    def prepare(self, answer: messages.GetTaskResponse, masking: Masking) -> None:
        """Open what the neighbors have sent, before the device trains.

        Args:
            answer: Verified task of kind TRAIN.
            masking: Of its signed task, which the device's policy allows.

        Raises:
            GroupAbandonedError: A neighbor has sent what does not open.
            InvalidStatementError: What the coordinator shows does not verify, or contradicts what it showed before.
            KeyStoreError: The device's state cannot be written.
        """
        step = self._step(answer, masking)
        with _checked():
            step.prepare()

    def mask(
        self,
        answer: messages.GetTaskResponse,
        masking: Masking,
        vector: Array,
    ) -> security_pb2.NeighborMasking:
        """Add the masks of the device to its update, in place, and remember that it was masked.

        Args:
            answer: Verified task of kind TRAIN.
            masking: Of its signed task.
            vector: The quantized update.

        Returns:
            What the update's statement says of its masks.

        Raises:
            RepeatedTaskError: The device has already masked an update in this round, or may have, because its key store
                was copied: two updates under one mask would tell their difference.
            InvalidStatementError: What the coordinator shows does not verify.
            KeyStoreError: The device's state cannot be written.
        """
        step = self._step(answer, masking)
        try:
            with _checked():
                return step.mask(vector)
        except GroupAbandonedError as error:
            raise RepeatedTaskError(str(error)) from error

    def record_update(self, statement: security_pb2.UpdateStatement, digest: str) -> None:
        """Remember the digest of the signed statement of an update, before the update is sent.

        Raises:
            KeyStoreError: The device's state cannot be written.
        """
        state = _read(self._store, statement.training_session_id)
        if state is None or state.task_digest != statement.masking.task_digest:
            raise KeyStoreError("the state of the round with neighbors is gone")
        state.update_digest = digest
        _write(self._store, statement.training_session_id, state)

    def forget(self, training_session_id: str) -> None:
        """Delete the state of a training session that has ended."""
        self._store.delete(_PREFIX + training_session_id)


class NeighborRounds(NeighborMember):
    """An enrolled device in rounds with neighbors. Thread-safe for different training sessions.

    Args:
        store: Key store of the device.
        calls: Authenticated calls.
        trust: The coordinator's keyset.
        identity: Returns the device with the keys that the coordinator accepts.
    """

    def __init__(
        self, store: KeyStore, calls: Calls, trust: Trust, identity: Callable[[], Identity]
    ) -> None:
        super().__init__(store, trust, lambda: Author.of(identity()))
        self._calls = calls

    def take_step(self, answer: messages.GetTaskResponse, masking: Masking) -> None:
        """Take the step that a verified task asks for.

        Args:
            answer: Of kind ADVERTISE, SHARE, CONFIRM or REVEAL.
            masking: Of its signed task, which the device's policy allows.

        Raises:
            GroupAbandonedError: A neighbor does not keep the protocol.
            InvalidStatementError: What the coordinator shows does not verify, or contradicts what it showed before.
            KeyStoreError: The device's state cannot be written; nothing was sent.
            QflareClientError: The call failed; the step may be repeated.
        """
        request = self.make_step(answer, masking, lambda count: self._more(answer, count))
        self._calls.unary(self._calls.transport.stub.SecureAggregationStep, request)

    def _more(self, answer: messages.GetTaskResponse, first_member: int) -> messages.NeighborView:
        """Return further neighbors for the same step."""
        request = messages.GetTaskRequest(
            training_session_id=answer.training_session_id,
            trains_only=True,
            answers_queries=True,
            first_member=first_member,
        )
        found = self._calls.unary(self._calls.transport.stub.GetTask, request)
        if (found.kind, found.task.payload) != (answer.kind, answer.task.payload):
            raise GroupAbandonedError("the step ended before all neighbors were read")
        view: messages.NeighborView = found.neighbors
        return view


class _Step:
    """One step of a round."""

    def __init__(
        self,
        store: StateStore,
        registrars: Registrars,
        author: Author,
        sources: Sources,
        answer: messages.GetTaskResponse,
        masking: Masking,
    ) -> None:
        self._store = store
        self._registrars = registrars
        self._author = author
        self._sources = sources
        self._view = answer.neighbors
        self.more: Callable[[int], messages.NeighborView] | None = None
        self._masking = masking
        self._session_id = answer.training_session_id
        self._round = MaskedRound(
            author.realm, answer.training_session_id, answer.round_number, masking.task_digest
        )

    def advertise(self) -> messages.SecureAggregationStepRequest:
        """Make new secrets for a round, or advertise those made before."""
        state = _read(self._store, self._session_id)
        if state is None or state.task_digest != self._round.task_digest:
            state = self._begin()
        return messages.SecureAggregationStepRequest(
            advertisement=state.envelope(state.advertisement)
        )

    def _begin(self) -> _State:
        secrets = MemberSecrets.generate(self._sources.draw)
        statement = security_pb2.NeighborAdvertisement(
            channel_key=secrets.channel_key.public.to_proto(),
            mask_key=secrets.mask_key.public.to_proto(),
            self_seed_digest=secrets.self_seed_digest,
            nonce=self._sources.draw(NONCE_BYTES),
        )
        signed = self._sign(statement)
        state = _State(
            self._round.number,
            self._round.task_digest,
            secrets.to_bytes().hex(),
            _hex(signed),
            place=self._store.place,
        )
        self._write(state)
        return state

    def share(self) -> messages.SecureAggregationStepRequest:
        """Send shares to the neighbors of the roster that the coordinator shows; only one is ever accepted."""
        state = self._state()
        roster = [item.hex() for item in self._view.roster]
        if not state.shares:
            self._join(state, roster)
        require_equal("roster", roster, state.roster)
        shares = messages.SharedSecrets.FromString(bytes.fromhex(state.shares))
        return messages.SecureAggregationStepRequest(shares=shares)

    def _join(self, state: _State, roster: list[str]) -> None:
        graph, own = self._graph(roster), state.own
        if own not in graph or len(roster) < self._masking.min_cohort:
            raise StatementError("roster: without this device, or smaller than the task promises")
        views = self._views(graph, own)
        members = self._members(views, graph, own)
        keys = {digest: member.keys for digest, member in members.items()}
        boxes = _secrets(state).make_boxes(graph, own, keys)
        statement = security_pb2.NeighborShares(
            advertisement_digest=own,
            roster_digest=graph.roster_digest,
            boxes_digest=merkle.root(boxes_tree(boxes)).hex(),
        )
        made = messages.SharedSecrets(statement=self._sign(statement), boxes=boxes)
        state.roster, state.shares = roster, _hex(made)
        state.members = {
            digest_of(shown.advertisement.payload): _kept(shown.advertisement, members)
            for view in views
            for shown in view.members
        }
        self._write(state)

    def _views(self, graph: NeighborGraph, own: str) -> list[messages.NeighborView]:
        """Return the answers in which the coordinator shows all neighbors."""
        views, wanted = [self._view], len(graph.neighbors(own))
        count = len(self._view.members)
        while count < wanted and self.more is not None:
            view = self.more(count)
            require_equal("roster", list(view.roster), list(self._view.roster))
            if not view.members:
                raise StatementError(f"members: {count}, want {wanted}")
            views.append(view)
            count += len(view.members)
        return views

    def _receipt_keys(self, views: Sequence[messages.NeighborView]) -> list[PublicKey]:
        """Return the keys that may have signed the receipts of the members."""
        found = list[PublicKey]()
        for view in views:
            signers = {
                signature.key_id
                for shown in view.members
                for evidence in shown.device_keys
                for signature in evidence.receipt.signatures
            }
            found += self._registrars.registrar_keys(signers, view.earlier_keysets)
        return found

    def _members(
        self, views: Sequence[messages.NeighborView], graph: NeighborGraph, own: str
    ) -> dict[str, Member]:
        """Verify the advertisements of all neighbors, and keep them."""
        proven = ProvenKeys(self._round.realm, self._receipt_keys(views))
        members = {}
        for shown in (member for view in views for member in view.members):
            envelope = shown.advertisement
            stated = security_pb2.NeighborAdvertisement.FromString(envelope.payload)
            for shown_key in shown.device_keys:
                proven.add(shown_key)
            key = proven.get(stated.device_id, stated.key_id)
            member = open_advertisement(envelope, key, self._round)
            members[member.digest] = member
        require_equal("members", sorted(members), list(graph.neighbors(own)))
        devices = {member.device_id for member in members.values()} | {self._author.device_id}
        require_equal("devices", len(devices), len(members) + 1)
        return members

    def prepare(self) -> None:
        """Open the boxes of the neighbors that the coordinator says have sent shares; only one such set is accepted."""
        state = self._state()
        sharers = [item.hex() for item in self._view.sharers]
        if state.sharers:
            require_equal("sharers", sharers, state.sharers)
            return
        graph = self._graph(state.roster)
        state.sharers = sharers
        entries = self._sharers(state, graph)
        state.opened = {
            sender: [box.shares.mask.hex(), box.shares.own.hex(), (box.pair_seed or b"").hex()]
            for sender, box in self._open_boxes(state, graph, entries).items()
        }
        if len(state.opened) < graph.parameters.threshold:
            raise NotEnoughSharesError("too few neighbors have sent shares")
        self._write(state)

    def mask(self, vector: Array) -> security_pb2.NeighborMasking:
        """Mask an update, once in a round."""
        state = self._state()
        if state.has_masked:
            raise RepeatedTaskError("an update was already masked in this round")
        graph, own = self._graph(state.roster), state.own
        _secrets(state).mask(vector, graph, own, _opened(state))
        state.has_masked = True
        self._write(state)
        entries = state.entries(state.sharers)
        return security_pb2.NeighborMasking(
            advertisement_digest=own,
            roster_digest=graph.roster_digest,
            sharers_digest=sharers_digest(graph, entries),
        )

    def _sharers(self, state: _State, graph: NeighborGraph) -> dict[str, str]:
        require_equal("sharers", len(state.sharers), len(state.roster))
        entries = state.entries(state.sharers)
        shares = messages.SharedSecrets.FromString(bytes.fromhex(state.shares))
        require_equal("sharers", entries.get(state.own), digest_of(shares.statement.payload))
        check_survivors(graph, entries, entries)
        return entries

    def _open_boxes(
        self, state: _State, graph: NeighborGraph, entries: Mapping[str, str]
    ) -> dict[str, OpenedBox]:
        own, opened = state.own, {}
        members, secrets = _members(state, self._round), _secrets(state)
        for received in self._view.boxes:
            stated = security_pb2.NeighborShares.FromString(received.shares.payload)
            sender = stated.advertisement_digest
            if sender not in members:
                raise StatementError("a box is from no neighbor")
            statement = open_shares(received.shares, members[sender], self._round, graph)
            require_equal("shares", digest_of(received.shares.payload), entries.get(sender))
            check_box_proof(statement, graph, received.box, received.proof)
            opened[sender] = secrets.open_box(graph, own, sender, received.box)
        wanted = [item for item in graph.neighbors(own) if item in entries]
        require_equal("boxes", sorted(opened), wanted)
        return opened

    def confirm(self) -> messages.SecureAggregationStepRequest:
        """Confirm the set of updates that the coordinator shows; only one is ever confirmed."""
        state = self._state()
        survivors = [item.hex() for item in self._view.survivors]
        if not state.confirmation:
            self._confirm(state, survivors)
        require_equal("survivors", survivors, state.survivors)
        return messages.SecureAggregationStepRequest(
            confirmation=state.envelope(state.confirmation)
        )

    def _confirm(self, state: _State, survivors: list[str]) -> None:
        graph = self._graph(state.roster)
        require_equal("survivors", len(survivors), len(state.roster))
        entries = state.entries(survivors)
        if not state.update_digest or entries.get(state.own) != state.update_digest:
            raise StatementError("survivors: without the update of this device")
        if len(entries) < self._masking.min_cohort:
            raise StatementError("survivors: fewer than the task promises")
        sharers = state.entries(state.sharers)
        check_survivors(graph, sharers, entries)
        sharers_of = sharers_digest(graph, sharers)
        statement = security_pb2.NeighborConfirmation(
            advertisement_digest=state.own,
            roster_digest=graph.roster_digest,
            sharers_digest=sharers_of,
            survivors_digest=survivors_digest(graph, sharers_of, entries),
        )
        state.survivors, state.confirmation = survivors, _hex(self._sign(statement))
        self._write(state)

    def reveal(self) -> messages.SecureAggregationStepRequest:
        """Reveal shares for the set of updates that was confirmed, once enough neighbors have confirmed it too."""
        state = self._state()
        if not state.confirmation:
            raise StatementError("reveal: this device has confirmed no set of updates")
        if not state.reveal:
            self._reveal(state)
        return messages.SecureAggregationStepRequest(reveal=state.envelope(state.reveal))

    def _reveal(self, state: _State) -> None:
        graph, own = self._graph(state.roster), state.own
        members = _members(state, self._round)
        confirmed = security_pb2.NeighborConfirmation.FromString(
            state.envelope(state.confirmation).payload
        )
        signed = []
        for envelope in self._view.confirmations:
            stated = security_pb2.NeighborConfirmation.FromString(envelope.payload)
            if stated.advertisement_digest not in members:
                raise StatementError("a confirmation is of no neighbor")
            signed.append((envelope, members[stated.advertisement_digest]))
        survivors = confirmed.survivors_digest
        count = count_confirmations(signed, self._round, graph, own, survivors)
        threshold = graph.parameters.threshold
        if count < threshold:
            raise StatementError(f"{count} neighbors have confirmed, want {threshold}")
        statement = security_pb2.NeighborReveal(
            advertisement_digest=own,
            roster_digest=graph.roster_digest,
            survivors_digest=survivors,
        )
        entries = state.entries(state.survivors)
        for owner, box in sorted(_opened(state).items()):
            share = box.shares.own if owner in entries else box.shares.mask
            statement.shares.add(owner_digest=owner, share=share)
        state.reveal = _hex(self._sign(statement))
        self._write(state)

    def _graph(self, roster: Sequence[str]) -> NeighborGraph:
        assert self._masking.neighbors is not None
        return self._masking.neighbors.graph(roster)

    def _sign(self, statement: NeighborStatement) -> security_pb2.SignedEnvelope:
        key = self._author.key
        self._round.fill(statement, self._author.device_id, key.public.key_id)
        statement.create_time.CopyFrom(self._sources.clock())
        return sign_neighbor_statement(key, statement)

    def _state(self) -> _State:
        state = _read(self._store, self._session_id)
        if state is None or state.task_digest != self._round.task_digest:
            raise StatementError("this device has advertised nothing for the round")
        if state.place != self._store.place:
            raise GroupAbandonedError("the key store was copied or restored since the round began")
        return state

    def _write(self, state: _State) -> None:
        _write(self._store, self._session_id, state)


_STEPS: Final[Mapping[int, Callable[[_Step], messages.SecureAggregationStepRequest]]] = {
    messages.TASK_KIND_ADVERTISE: _Step.advertise,
    messages.TASK_KIND_SHARE: _Step.share,
    messages.TASK_KIND_CONFIRM: _Step.confirm,
    messages.TASK_KIND_REVEAL: _Step.reveal,
}


def _kept(envelope: security_pb2.SignedEnvelope, members: Mapping[str, Member]) -> dict[str, Any]:
    key = members[digest_of(envelope.payload)].key
    return {"advertisement": _hex(envelope), "algorithm": int(key.algorithm), "key": key.data.hex()}


def _members(state: _State, masked_round: MaskedRound) -> dict[str, Member]:
    """Return the neighbors, as they were verified when the device joined the roster."""
    return {
        digest: open_advertisement(
            state.envelope(kept["advertisement"]),
            PublicKey(algorithm_of(kept["algorithm"]), bytes.fromhex(kept["key"])),
            masked_round,
        )
        for digest, kept in state.members.items()
    }


def _opened(state: _State) -> dict[str, OpenedBox]:
    opened = {}
    for sender, parts in state.opened.items():
        mask, own, pair = map(bytes.fromhex, parts)
        opened[sender] = OpenedBox(Shares(mask, own), pair or None)
    return opened


def _secrets(state: _State) -> MemberSecrets:
    return MemberSecrets.from_bytes(bytes.fromhex(state.secrets))


def _hex(message: Any) -> str:
    return str(message.SerializeToString(deterministic=True).hex())


def _read(store: StateStore, training_session_id: str) -> _State | None:
    """Return the state of the latest round of a training session; None if there is none.

    Raises:
        KeyStoreError: It is damaged.
    """
    data = store.read_secret(_PREFIX + training_session_id)
    if data is None:
        return None
    try:
        return _State(**json.loads(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise KeyStoreError(f"{store.home / (_PREFIX + training_session_id)} is damaged") from error


def _write(store: StateStore, training_session_id: str, state: _State) -> None:
    store.write_secret(_PREFIX + training_session_id, json.dumps(asdict(state)).encode())


@contextmanager
def _checked() -> Iterator[None]:
    try:
        yield
    except (NeighborError, NotEnoughSharesError) as error:
        raise GroupAbandonedError(str(error)) from error
    except (DecodeError, ValueError) as error:
        raise InvalidStatementError(f"secure aggregation: {error}") from error
