"""Memory of a round of a rule that needs all updates at the end: what is kept of each while the round is open."""

import gc
import tracemalloc
from dataclasses import replace

import pytest

from qflare.crypto.signing import Algorithm, SigningKey
from qflare.v1 import training_pb2
from tests.contract.conftest import MakeCore
from tests.support.use_cases import CoordinatorHarness, vector

DEVICES = 40
BYTES_AN_UPDATE = 4_000
"""Ids, digests, metrics, a payload of three elements and how to read it; a signature of ML-DSA-87 alone has 4,627."""


def submit_signed(core: CoordinatorHarness, session_id: str, name: str, key: SigningKey) -> None:
    draft = core.draft(name, session_id, vector(1.0))
    public = key.public
    draft.device = replace(
        draft.device,
        key_id=public.key_id,
        algorithm=int(public.algorithm),
        public_key=public.data,
    )
    draft.statement.key_id = public.key_id
    draft.signing_key = key
    core.send(draft)


def bytes_kept(core: CoordinatorHarness, strategy: str, count: int) -> float:
    """Take updates of an open round in; return the bytes that stay for each."""
    session_id = core.start(
        strategy=training_pb2.StrategyConfig(name=strategy),
        rounds=training_pb2.RoundPolicy(quorum=count, target=count + 1),
    )
    for number in range(count):
        name, key = f"{strategy}-{number}", SigningKey.generate(Algorithm.ML_DSA_87)
        core.add_signing_device(name, key)
        submit_signed(core, session_id, name, key)
    gc.collect()
    tracemalloc.start()
    try:
        core.settle()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("strategy", ["median", "krum"])
def test_no_evidence_of_an_update_is_kept_once_it_was_checked(
    make_core: MakeCore, strategy: str
) -> None:
    core = make_core(require_signatures=True)
    bytes_kept(core, "trimmed_mean", 3)  # loads code and fills caches

    assert bytes_kept(core, strategy, DEVICES) < BYTES_AN_UPDATE
