"""Mutated requests to a helper: no call ends in INTERNAL or UNKNOWN, or in a traceback."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from qflare.evidence.statements import StatementError
from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2
from tests.integration.secure_aggregation.conftest import SecureDeployment, contribute
from tests.integration.secure_aggregation.test_attacks import LyingCoordinator
from tests.support.hostile_requests import RequestMaker

Code = grpc.StatusCode
FAULTS: Final = frozenset({Code.INTERNAL, Code.UNKNOWN})
COUNT: Final = 150
UNMASK: Final = "/qflare.v1.HelperService/Unmask"


class HelperFuzzer:
    """Spoils parts of a right request, statements inside of envelopes too, signed again where a coordinator can."""

    def __init__(self, made: SecureDeployment, liar: LyingCoordinator) -> None:
        self._random = Random(1)
        self._maker = RequestMaker(self._random, {})
        self._liar = liar
        self._sign = made.deployment.coordinator.parts.keys.sign

    def parts(self) -> list[bytes]:
        """Return the serialized parts of a request."""
        parts = self._right()
        for _ in range(self._random.choice((0, 1, 1, 2))):
            self._spoil(self._random.choice(parts))
        data = [part.SerializeToString() for part in parts]
        if self._random.random() < 0.3:
            place = self._random.randrange(len(data))
            data[place] = self._maker.spoil_bytes(data[place])
        if self._random.random() < 0.2:
            self._random.shuffle(data)
        return data[: self._random.choice((0, 1, *[len(data)] * 6))]

    def _right(self) -> list[messages.UnmaskRequest]:
        parts = self._liar.parts(self._liar.members)
        parts[0].header.check_only = self._random.random() < 0.5
        return self._joined(parts) if self._random.random() < 0.5 else parts

    def _joined(self, parts: list[messages.UnmaskRequest]) -> list[messages.UnmaskRequest]:
        """Return a request with some or all of its updates in one part."""
        count = self._random.randint(2, len(parts))
        together = messages.UnmaskRequest()
        together.members.members.extend(part.member for part in parts[1:count])
        return [parts[0], together, *parts[count:]]

    def _spoil(self, part: messages.UnmaskRequest) -> None:
        choice = self._random.random()
        if part.HasField("members") and part.members.members and choice < 0.5:
            member = self._random.choice(part.members.members)
            self._spoil_inside(member.statement, security_pb2.UpdateStatement)
        elif part.HasField("members"):
            self._maker.spoil(part.members)
        elif not part.HasField("header"):
            if choice < 0.5:
                self._spoil_inside(part.member.statement, security_pb2.UpdateStatement)
            else:
                self._maker.spoil(part.member)
        elif choice < 0.4:
            self._spoil_inside(part.header.request, security_pb2.UnmaskingRequest)
        elif choice < 0.7:
            self._spoil_inside(part.header.task, security_pb2.TaskStatement)
        else:
            self._maker.spoil(part.header)

    def _spoil_inside(self, envelope: security_pb2.SignedEnvelope, kind: Any) -> None:
        try:
            statement = kind.FromString(envelope.payload)
        except DecodeError:  # spoiled before
            return
        self._maker.spoil(statement)
        payload = statement.SerializeToString(deterministic=True)
        envelope.payload = payload
        with suppress(
            StatementError
        ):  # a coordinator signs nothing malformed; sent with the old signature
            if kind is security_pb2.TaskStatement:
                envelope.CopyFrom(self._sign(security_pb2.KEY_ROLE_TASK, payload))
            elif kind is security_pb2.UnmaskingRequest:
                envelope.CopyFrom(self._liar._parts.keys.sign_request(payload))


def test_no_mutated_request_is_a_fault_of_the_helper(
    secure: Callable[..., SecureDeployment],
) -> None:
    made = secure()
    session_id = made.session(quorum=5, policy={"min_cohort": 2})
    for index in range(2):
        contribute(made.deployment.device(f"device-{index}"), session_id, index)
    fuzzer = HelperFuzzer(made, LyingCoordinator(made, session_id))
    helper, codes, faults = made.helpers[0], Counter[grpc.StatusCode](), []
    with grpc.insecure_channel(helper.address) as channel:
        call: Any = channel.stream_stream(UNMASK)
        for number in range(COUNT):
            try:
                list(call(iter(fuzzer.parts()), timeout=30))
                codes[Code.OK] += 1
            except grpc.RpcError as error:
                failed: Any = error
                codes[failed.code()] += 1
                if failed.code() in FAULTS:
                    faults.append((number, failed.details()))
    assert faults == []
    assert codes[Code.INVALID_ARGUMENT] > COUNT // 4
    assert codes[Code.OK] > COUNT // 50
    log = (helper.home.parent / f"{helper.home.name}.log").read_text()
    assert "Traceback" not in log
    assert "problem" not in helper.run("audit", "verify")
