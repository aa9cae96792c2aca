"""A lying coordinator against a real helper: it signs what it likes with the coordinator's own keys."""

from collections.abc import Iterable
from typing import Any

import grpc
import pytest

from qflare.evidence.lineage import contributors_digest
from qflare.evidence.statements import digest_of
from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare.v1.helper_service_pb2_grpc import HelperServiceStub
from qflare_server.keys.device_identities import key_evidence
from qflare_server.storage.repository import evidence, training_sessions, updates
from tests.integration.secure_aggregation.conftest import SecureDeployment, SecureStart, contribute

Member = messages.UnmaskMember


class LyingCoordinator:
    """Asks a helper for any set of updates of a round, with everything that a coordinator has."""

    def __init__(self, made: SecureDeployment, session_id: str, round_number: int = 1) -> None:
        self._helper = made.helpers[0]
        self._parts = made.deployment.coordinator.parts
        with self._parts.database.read() as session:
            found = training_sessions.get_round(session, session_id, round_number)
            accepted = updates.accepted_after(session, session_id, round_number, 0, 100)
            keys = evidence.keys_of(session, {update.device_id for update in accepted})
            self._roots = [_envelope(data) for data in evidence.trust_documents(session, "root")]
            self._keysets = [
                _envelope(data) for data in evidence.trust_documents(session, "keyset")
            ]
        assert found is not None
        assert found.task is not None
        self.task = _envelope(found.task)
        self.session_id, self.round_number = session_id, round_number
        self.members = [
            Member(
                statement=security_pb2.SignedEnvelope(
                    payload=update.statement or b"",
                    signatures=[security_pb2.Signature.FromString(update.signature or b"")],
                ),
                device_keys=[
                    key_evidence(key) for key in keys if key.device_id == update.device_id
                ],
            )
            for update in accepted
        ]

    def request(self, members: Iterable[Member], **changes: Any) -> security_pb2.UnmaskingRequest:
        digests = [digest_of(member.statement.payload) for member in members]
        values: dict[str, Any] = {
            "realm": "qflare",
            "training_session_id": self.session_id,
            "round_number": self.round_number,
            "helper_id": self._helper.helper_id,
            "task_digest": digest_of(self.task.payload),
            "members_digest": contributors_digest(digests),
            "member_count": len(digests),
        }
        return security_pb2.UnmaskingRequest(**(values | changes))

    def ask(
        self,
        members: list[Member],
        *,
        task: Any = None,
        header: Any = None,
        earlier: Iterable[security_pb2.SignedEnvelope] = (),
        together: int = 0,
        **changes: Any,
    ) -> list[messages.UnmaskResponse]:
        """Ask for a set, with so many updates in one part, or each in one; raises what the helper answers."""
        parts = self.parts(members, task=task, header=header, **changes)
        if together:
            places = range(0, len(members), together)
            parts[1:] = [_joined(members[place : place + together]) for place in places]
        parts[1:1] = [messages.UnmaskRequest(earlier_task=envelope) for envelope in earlier]
        with grpc.insecure_channel(self._helper.address) as channel:
            return list(HelperServiceStub(channel).Unmask(iter(parts), timeout=20))

    def parts(
        self, members: list[Member], *, task: Any = None, header: Any = None, **changes: Any
    ) -> list[messages.UnmaskRequest]:
        """Return the parts of a request."""
        request = self.request(members, **changes).SerializeToString(deterministic=True)
        made = header or messages.UnmaskHeader(
            request=self._parts.keys.sign_request(request),
            task=task or self.task,
            keyset=security_pb2.KeysetBundle(roots=self._roots, keyset=self._keysets[-1]),
            earlier_keysets=self._keysets[:-1],
        )
        parts = [messages.UnmaskRequest(header=made)]
        return parts + [messages.UnmaskRequest(member=member) for member in members]

    def refusal(self, members: list[Member], **changes: Any) -> str:
        """Return the text of a refusal."""
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(members, **changes)
        error: Any = caught.value
        assert error.code() is not grpc.StatusCode.INTERNAL
        return f"{error.code().name}: {error.details()}"


def _joined(members: Iterable[Member]) -> messages.UnmaskRequest:
    """Return a part of a request with several updates."""
    return messages.UnmaskRequest(members=messages.UnmaskMembers(members=members))


def _envelope(data: bytes) -> security_pb2.SignedEnvelope:
    return security_pb2.SignedEnvelope.FromString(data)


@pytest.fixture
def liar(secure: SecureStart) -> LyingCoordinator:
    """Return a coordinator whose round has four updates and is not closed."""
    made = secure(min_cohort=3)
    session_id = made.session(quorum=5, policy={"min_cohort": 3})
    for index in range(4):
        contribute(made.deployment.device(f"device-{index}"), session_id, index)
    return LyingCoordinator(made, session_id)


def test_a_helper_answers_a_set_once_and_nothing_that_overlaps_it(liar: LyingCoordinator) -> None:
    first = liar.ask(liar.members)
    again = liar.ask(list(reversed(liar.members)))
    assert first == again
    assert liar.ask(liar.members, together=3) == first
    assert first[0].answer.answer == first[0].answer.latest
    assert "in a set that was answered before" in liar.refusal(liar.members[:3])


def test_small_and_false_sets_are_refused(liar: LyingCoordinator) -> None:
    assert "SMALL" not in (text := liar.refusal(liar.members[:2])), text
    assert "want at least" in text
    doubled = [*liar.members[:3], liar.members[0]]
    digests = [digest_of(member.statement.payload) for member in liar.members]
    text = liar.refusal(doubled[:3], member_count=4, members_digest=contributors_digest(digests))
    assert "not those of the request" in text
    forged = [Member.FromString(member.SerializeToString()) for member in liar.members]
    statement = security_pb2.UpdateStatement.FromString(forged[0].statement.payload)
    statement.update_id = "00000000-0000-4000-8000-000000000000"
    forged[0].statement.payload = statement.SerializeToString()
    assert "INVALID_ARGUMENT" in liar.refusal(forged)
    unknown = [Member.FromString(member.SerializeToString()) for member in liar.members]
    del unknown[0].device_keys[:]
    assert "INVALID_ARGUMENT" in liar.refusal(unknown)
    swapped = [Member.FromString(member.SerializeToString()) for member in liar.members]
    swapped[0].device_keys[0].receipt.CopyFrom(liar.members[1].device_keys[0].receipt)
    assert "INVALID_ARGUMENT" in liar.refusal(swapped)
    assert len(liar.ask(liar.members)) > 1  # no refusal used the set up


def test_a_task_that_asks_for_less_is_another_task(liar: LyingCoordinator) -> None:
    weaker = security_pb2.TaskStatement.FromString(liar.task.payload)
    weaker.masking.policy.min_cohort = 2
    payload = weaker.SerializeToString(deterministic=True)
    signed = liar._parts.keys.sign(security_pb2.KEY_ROLE_TASK, payload)
    text = liar.refusal(liar.members, task=signed, task_digest=digest_of(payload))
    assert "task_digest" in text
    assert "task_digest" in liar.refusal(liar.members, task=signed)


def test_a_request_for_another_helper_or_round_is_refused(liar: LyingCoordinator) -> None:
    assert "helper_id" in liar.refusal(liar.members, helper_id="0" * 64)
    assert "round_number" in liar.refusal(liar.members, round_number=2)
    unsigned = messages.UnmaskHeader(
        request=security_pb2.SignedEnvelope(payload=b"x"), task=liar.task
    )
    assert "keyset" in liar.refusal(liar.members, header=unsigned)


def test_a_restored_ledger_is_detected(liar: LyingCoordinator) -> None:
    helper = liar._helper
    liar.ask(liar.members)
    assert "1 answers with 4 updates verified" in helper.run("audit", "verify")
    text = liar.refusal(liar.members, last_counter=2)
    assert text.startswith("DATA_LOSS")


def test_the_answer_survives_a_kill(liar: LyingCoordinator) -> None:
    first = liar.ask(liar.members)
    helper = liar._helper
    helper.kill()
    helper.start()
    assert liar.ask(liar.members) == first
    assert "in a set that was answered before" in liar.refusal(liar.members[:3])
    assert "1 answers" in helper.run("audit", "verify")


def test_the_policy_of_the_operator_decides(liar: LyingCoordinator) -> None:
    file = liar._helper.home / "policy.toml"
    kept = file.read_text()
    keys = [member.device_keys[0].key.key_id for member in liar.members]
    file.write_text(f"min_cohort = 3\nroster = {keys[:2]!r}\n".replace("'", '"'))
    assert "2 counted updates" in liar.refusal(liar.members)
    file.write_text('min_cohort = 3\ntraining_sessions = ["another"]\n')
    assert "PERMISSION_DENIED" in liar.refusal(liar.members)
    file.write_text("min_cohort = 1\n")
    assert "PERMISSION_DENIED" in liar.refusal(liar.members)
    file.write_text(kept)
    assert len(liar.ask(liar.members)) > 1
