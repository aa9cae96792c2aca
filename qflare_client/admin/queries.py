"""Queries of federated analytics: asked, read and refined by an administrator."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Final

import numpy as np

from qflare.analytics.queries import (
    KINDS,
    MAX_BINS,
    MAX_EXAMPLES,
    TENSOR,
    InvalidQueryError,
    Query,
)
from qflare.analytics.refinement import NotRefinableError, refined
from qflare.analytics.results import NoisySum, Result
from qflare.tensors import Array
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client import arguments
from qflare_client.admin.connection import Admin
from qflare_client.admin.transfers import download_model, upload_model
from qflare_client.errors import (
    CorruptModelError,
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidRequestError,
)

RESULT_VERSION: Final = 1
"""Version that is the result of a query."""


_MOST_DEVICES: Final = 10_000_000


@dataclass(frozen=True)
class Question:
    """What a query asks, as in `docs/analytics.md`."""

    column: str
    """Name under which devices offer values, 1 to 100 printable characters."""

    kind: str
    """count, sum, mean, histogram, quantiles or labels."""

    lower: float = 0.0
    """Smallest value; smaller ones are taken for it, or counted as below. For all kinds but count and labels."""

    upper: float = 0.0
    """Largest value, above `lower`."""

    bins: int = 0
    """Number of bins of a histogram or for quantiles; 0 means 20 or 100."""

    quantiles: Sequence[float] = ()
    """Wanted quantiles, 0 to 1; empty means 0.25, 0.5 and 0.75."""

    labels: Sequence[str] = ()
    """Labels of the kind labels."""

    max_examples: int = 1
    """Number of values that a device counts as at most; 1 counts every device as one."""

    def to_proto(self, *, unmasked: bool = False) -> training_pb2.AnalyticsQuery:
        """Return the message.

        Args:
            unmasked: Whether the coordinator may read single answers.

        Raises:
            InvalidArgumentError: A value is of another type.
        """
        return training_pb2.AnalyticsQuery(
            column=arguments.text("column", self.column),
            kind=KINDS[arguments.one_of("kind", self.kind, tuple(KINDS))],
            lower=arguments.number("lower", self.lower),
            upper=arguments.number("upper", self.upper),
            bins=arguments.whole("bins", self.bins, 0, MAX_BINS),
            quantiles=[arguments.number("quantiles", item) for item in self.quantiles],
            labels=[arguments.text("labels", item) for item in self.labels],
            max_examples=arguments.whole("max_examples", self.max_examples, 1, MAX_EXAMPLES),
            unmasked=arguments.flag("unmasked", unmasked),
        )


@dataclass(frozen=True)
class Protection:
    """How a query protects those who answer it."""

    min_cohort: int
    """Fewest answers that are added up before anybody sees a number, 2 or more; with neighbors, in each group."""

    epsilon: float
    """Epsilon of the result, above 0."""

    delta: float = 0.0
    """Delta of the result; 0 means 1e-6."""

    helpers: Sequence[str] = ()
    """Ids of the helpers that hide single answers from the coordinator. Without any and without `neighbors`, it reads
    them."""

    neighbors: bool = False
    """Whether devices hide their answers among each other, in groups, without a helper."""

    group_size: int = 0
    """With neighbors: fewest devices of a group; 0 means one group."""

    corrupt_fraction: float = 0.0
    """With neighbors: share of the devices of a group that may collude with the coordinator; 0 means 0.2."""

    dropout_fraction: float = 0.0
    """With neighbors: share of the devices of a group that may drop out; 0 means 0.1."""

    step_timeout_s: float | None = None
    """With neighbors: time for each step before and after the answers, in seconds; None means 60. Groups are formed at
    its end, if `devices` have not advertised before, but `min_answers` have."""

    min_answers: int | None = None
    """Fewest answers in the result, at least `min_cohort`; None means `min_cohort`."""

    devices: int | None = None
    """Answers at which the query closes immediately; None means `min_answers`. With neighbors, most devices that may
    answer."""

    deadline_s: float | None = None
    """Longest wait for `devices`, in seconds."""

    groups: Sequence[str] = ()
    """Ask only devices of these groups."""


def query_config(question: Question, protection: Protection) -> training_pb2.TrainingConfig:
    """Return the configuration of a query.

    Raises:
        InvalidArgumentError: A value is of another type, or out of range.
    """
    masking = _secure_aggregation(protection)
    config = training_pb2.TrainingConfig(
        groups=[arguments.text("groups", item) for item in protection.groups],
        analytics=question.to_proto(unmasked=not masking.mode),
        privacy=training_pb2.PrivacyPolicy(
            epsilon_budget=arguments.number("epsilon", protection.epsilon),
            delta=arguments.number("delta", protection.delta),
        ),
        rounds=training_pb2.RoundPolicy(quorum=_quorum(protection)),
    )
    if protection.devices is not None:
        config.rounds.target = arguments.whole("devices", protection.devices, 2, _MOST_DEVICES)
    if protection.deadline_s is not None:
        seconds = arguments.positive("deadline_s", protection.deadline_s)
        config.rounds.deadline.FromTimedelta(timedelta(seconds=seconds))
    if masking.mode:
        config.secure_aggregation.CopyFrom(masking)
    return config


def _quorum(protection: Protection) -> int:
    """Return the fewest answers in the result."""
    least = arguments.whole("min_cohort", protection.min_cohort, 2, _MOST_DEVICES)
    if protection.min_answers is None:
        return least
    return arguments.whole("min_answers", protection.min_answers, least, _MOST_DEVICES)


def _secure_aggregation(protection: Protection) -> training_pb2.SecureAggregationPolicy:
    """Return how single answers are hidden from the coordinator; empty if they are not."""
    helpers = [arguments.text("helpers", item) for item in protection.helpers]
    policy = training_pb2.SecureAggregationPolicy(
        group_size=arguments.whole("group_size", protection.group_size, 0, _MOST_DEVICES),
        corrupt_fraction=arguments.not_negative("corrupt_fraction", protection.corrupt_fraction, 1),
        dropout_fraction=arguments.not_negative("dropout_fraction", protection.dropout_fraction, 1),
    )
    if protection.step_timeout_s is not None:
        seconds = arguments.positive("step_timeout_s", protection.step_timeout_s)
        policy.step_timeout.FromTimedelta(timedelta(seconds=seconds))
    if arguments.flag("neighbors", protection.neighbors):
        if helpers:
            raise InvalidArgumentError("helpers: with neighbors there is no helper")
        policy.mode = training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS
    elif policy != training_pb2.SecureAggregationPolicy():
        raise InvalidArgumentError(
            "neighbors: without them, group_size, corrupt_fraction, dropout_fraction and step_timeout_s have no meaning"
        )
    elif helpers:
        policy.mode = training_pb2.SECURE_AGGREGATION_MODE_HELPER
        policy.helpers.extend(helpers)
    if policy.mode:
        policy.min_cohort = protection.min_cohort
    return policy


@dataclass(frozen=True, eq=False)
class QueryResult:
    """Result of a query, with the facts that its signed statement holds.

    Attributes:
        session: The training session that the query is.
        version: The version with the noisy mean of the answers; `epsilon`, `delta` and `participant_count` are of it.
        answers: The noisy sum of the answers.
        neighbors: How many devices and groups came how far, with neighbors; None without.
    """

    session: training_pb2.TrainingSession
    version: training_pb2.GlobalModel
    answers: NoisySum
    neighbors: training_pb2.NeighborProgress | None = None

    @property
    def query(self) -> Query:
        """What was asked."""
        return self.answers.query

    @cached_property
    def result(self) -> Result:
        """The table."""
        return self.answers.result()


def create_query(
    admin: Admin, name: str, config: training_pb2.TrainingConfig, request_id: str = ""
) -> training_pb2.TrainingSession:
    """Create and start a query.

    Args:
        admin: The connection.
        name: 1 to 200 characters.
        config: With `analytics`.
        request_id: Idempotency key; empty means one of this call.

    Raises:
        InvalidRequestError: The query is refused.
        QflareClientError: A call failed.
    """
    try:
        query = Query.from_proto(config.analytics)
    except InvalidQueryError as error:
        raise InvalidRequestError(f"analytics.{error}") from error
    request = pb.CreateTrainingSessionRequest(name=name, config=config, request_id=request_id)
    session = admin.call("CreateTrainingSession", request).training_session
    session_id = session.training_session_id
    if session.current_version < 0:
        zeros: dict[str, Array] = {TENSOR: np.zeros(query.element_count, np.float32)}
        try:
            upload_model(admin, session_id, zeros)
        except BaseException:
            reason = "its vector was not uploaded"
            cancel = pb.CancelTrainingSessionRequest(training_session_id=session_id, reason=reason)
            admin.call("CancelTrainingSession", cancel)
            raise
    started: training_pb2.TrainingSession = admin.call(
        "StartTrainingSession", pb.StartTrainingSessionRequest(training_session_id=session_id)
    ).training_session
    return started


def read_result(admin: Admin, training_session_id: str) -> QueryResult:
    """Return the result of a query.

    Raises:
        InvalidRequestError: The training session is no query.
        FailedPreconditionError: There is no result yet.
        CorruptModelError: The result does not match its statement.
        QflareClientError: A call failed.
    """
    session = admin.call(
        "GetTrainingSession", pb.GetTrainingSessionRequest(training_session_id=training_session_id)
    ).training_session
    if not session.config.HasField("analytics"):
        raise InvalidRequestError(f"{session.name[:200]} trains a model and is no query")
    if session.current_version < RESULT_VERSION:
        state = training_pb2.TrainingSessionState.Name(session.state)
        word = state.removeprefix("TRAINING_SESSION_STATE_").lower()
        raise FailedPreconditionError(f"there is no result yet: the query is {word}")
    model, chunks = download_model(admin, training_session_id, RESULT_VERSION)
    data = b"".join(chunks)
    try:
        answers = NoisySum.of_version(session.config, data)
    except ValueError as error:
        raise CorruptModelError(f"the result is not that of the query: {error}") from error
    return QueryResult(session, model, answers, _neighbors(admin, session, model.round_number))


def _neighbors(
    admin: Admin, session: training_pb2.TrainingSession, round_number: int
) -> training_pb2.NeighborProgress | None:
    """Return how far the groups of the round came whose answers are in the result; None without groups."""
    mode = session.config.secure_aggregation.mode
    if mode != training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS:
        return None
    request = pb.ListRoundsRequest(training_session_id=session.training_session_id)
    latest = admin.collect("ListRounds", request, "rounds", 1).rounds
    return next((row.neighbors for row in latest if row.round_number == round_number), None)


def refine_query(
    admin: Admin,
    training_session_id: str,
    name: str,
    quantile: float,
    *,
    epsilon: float,
    delta: float = 0.0,
    bins: int = 0,
    request_id: str = "",
) -> training_pb2.TrainingSession:
    """Ask for a quantile again, between the bounds that the result of a query leaves.

    Args:
        admin: The connection.
        training_session_id: A query of kind histogram or quantiles that has a result.
        name: Of the new query, 1 to 200 characters.
        quantile: 0 to 1.
        epsilon: Of the new result.
        delta: Of the new result; 0 means the default.
        bins: Of the new query; 0 means the default.
        request_id: Idempotency key; empty means one of this call.

    Raises:
        InvalidRequestError: It is no such query, or the new one is refused.
        FailedPreconditionError: There is no result yet, or it leaves no narrower bounds.
        QflareClientError: A call failed.
        InvalidArgumentError: A number is of another type or out of range.
    """
    found = read_result(admin, training_session_id)
    try:
        config = refined(
            found.session.config,
            found.answers,
            arguments.number("quantile", quantile),
            epsilon=arguments.number("epsilon", epsilon),
            delta=arguments.number("delta", delta),
            bins=arguments.whole("bins", bins, 0, MAX_BINS),
        )
    except NotRefinableError as error:
        raise FailedPreconditionError(str(error)) from error
    return create_query(admin, name, config, request_id)
