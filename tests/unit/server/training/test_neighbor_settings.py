"""Settings of groups of neighbors: what is accepted at creation can form groups, however many devices come."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.masking.graph_parameters import (
    MAX_NEIGHBORS,
    InfeasibleGroupError,
    group_parameters,
    practical_parameters,
)
from qflare.v1 import training_pb2
from qflare_server.errors import InvalidRequestError
from qflare_server.training.config import complete
from qflare_server.training.neighbor_stages import split_groups


def config_of(
    quorum: int, target: int, group_size: int, corrupt: float, dropout: float
) -> training_pb2.TrainingConfig:
    return training_pb2.TrainingConfig(
        rounds=training_pb2.RoundPolicy(quorum=quorum, target=target),
        safeguards=training_pb2.SafeguardPolicy(max_example_count=10),
        secure_aggregation=training_pb2.SecureAggregationPolicy(
            mode=training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS,
            clip=1.0,
            min_cohort=min(quorum, 3),
            group_size=group_size,
            corrupt_fraction=corrupt,
            dropout_fraction=dropout,
        ),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(2, 120),
    st.integers(0, 60),
    st.floats(0.01, 0.6),
    st.floats(0.01, 0.45),
)
def test_every_number_of_devices_forms_groups(
    quorum: int, target: int, group_size: int, corrupt: float, dropout: float
) -> None:
    config = config_of(quorum, target, group_size, corrupt, dropout)
    try:
        complete(config)
    except InvalidRequestError:
        return
    digests = [f"{number:064x}" for number in range(target)]
    for count in range(max(quorum, 3), target + 1):
        for part in split_groups(digests[:count], group_size):
            practical_parameters(len(part), corrupt, dropout)


def test_a_size_between_the_smallest_and_the_largest_is_checked_too() -> None:
    """Of 7 to 13 devices, only 10 are too few for half of them corrupt and a fifth dropping out."""
    for size in (7, 13):
        group_parameters(size, 0.5, 0.2)
    with pytest.raises(InfeasibleGroupError):
        group_parameters(10, 0.5, 0.2)
    with pytest.raises(InvalidRequestError, match=r"group of 10 devices.*groups have 7 to 13"):
        complete(config_of(7, 30, 7, 0.5, 0.2))


def test_groups_whose_devices_need_too_many_neighbors_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_NEIGHBORS} are possible"):
        complete(config_of(900, 1000, 0, 0.1, 0.3))
    complete(config_of(900, 1000, 100, 0.1, 0.1))


def test_the_number_of_neighbors_suffices_for_the_largest_group() -> None:
    assert group_parameters(10_000, 0.2, 0.1).neighbor_count <= MAX_NEIGHBORS
