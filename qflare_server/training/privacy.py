"""Central differential privacy of a training session: noise seed, ledger and budget.

`TrainingSession.privacy_state` holds both: the seed sealed under a key that is derived from the replicas' state key,
so that neither a copy of the database nor the key file alone gives the noise away; and the ledger of the accountant.
The seed is drawn before the first update is folded and is the same after every crash, and so are the bytes of every
version. It is drawn again only where it no longer opens, because the state key was replaced after a theft; the
versions before that can then no longer be recomputed.

The guarantee covers the weights, not what devices report. Metrics reported with updates are left out of the versions of
such a session. Example counts and participation are not secret. Results of federated evaluation get no noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.crypto.symmetric import SECRET_BYTES, UnsealError, decrypt, encrypt, hkdf_expand
from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.errors import StrategyRefusedError, TrainingSessionNotFoundError
from qflare_server.storage.repository import audit, training_sessions
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import RiskLevel
from qflare_server.strategies import PrivacyBudgetExceededError
from qflare_server.strategies.accounting import PrivacyLedger, PrivacySpent, spend, with_version
from qflare_server.strategies.config import PrivacyConfig
from qflare_server.training.masking import has_noise_in_sum
from qflare_server.training.strategy import privacy_config

SEED: Final = "noise_seed"
LEDGER: Final = "ledger"
LOST: Final = "lost"
_KEY_INFO: Final = b"qflare/v1/noise seed"
_ASSOCIATED: Final = b"qflare/v1/noise seed of "


@dataclass(frozen=True)
class PrivacyCharge:
    """Privacy cost of releasing one version.

    Attributes:
        before: The ledger that it was computed from, as rows; the release counts only while this is still it.
        after: The guarantee that holds with the version.
        is_last: Whether no further version can be afforded.
    """

    before: list[list[float]]
    after: PrivacySpent
    is_last: bool


def require_affordable(config: training_pb2.TrainingConfig) -> None:
    """Reject a budget too small for one version.

    Raises:
        StrategyRefusedError: The message gives the epsilon of one version.
    """
    privacy = privacy_config(config)
    if privacy is None:
        return
    try:
        spend(privacy, PrivacyLedger())
    except PrivacyBudgetExceededError as error:
        raise StrategyRefusedError(str(error), field="config.privacy.epsilon_budget") from error


def allowance(
    config: training_pb2.TrainingConfig, state: Mapping[str, Any] | None
) -> PrivacyCharge:
    """Account for one more version of a private training session, before it is released.

    Args:
        config: Of the training session; it has privacy.
        state: Its `privacy_state`.

    Raises:
        PrivacyBudgetExceededError: The version must not be released.
    """
    privacy = privacy_config(config)
    assert privacy is not None
    rows = ledger_rows(state)
    after = spend(privacy, PrivacyLedger.from_rows(rows))
    return PrivacyCharge(rows, after, is_last=not _affords(privacy, after.ledger))


def _affords(privacy: PrivacyConfig, ledger: PrivacyLedger) -> bool:
    try:
        spend(privacy, ledger)
    except PrivacyBudgetExceededError:
        return False
    return True


def ledger_rows(state: Mapping[str, Any] | None) -> list[list[float]]:
    """Return the ledger in a `privacy_state`, as rows."""
    return list((state or {}).get(LEDGER, []))


def with_ledger(state: Mapping[str, Any] | None, spent: PrivacySpent) -> dict[str, Any]:
    """Return a `privacy_state` with the ledger after a version."""
    return {**(state or {}), LEDGER: spent.ledger.as_rows()}


def lost_versions(state: Mapping[str, Any] | None) -> set[str]:
    """Return the digests of released versions that the database has lost and that its ledger counts."""
    return set((state or {}).get(LOST, []))


def account_for_lost(
    config: training_pb2.TrainingConfig, state: Mapping[str, Any] | None, digests: Sequence[str]
) -> dict[str, Any]:
    """Return a `privacy_state` whose ledger counts further versions that were released and lost.

    Args:
        config: Of the training session; it has privacy.
        state: Its `privacy_state`.
        digests: Of the versions, none of them counted before.
    """
    privacy = privacy_config(config)
    assert privacy is not None
    ledger = PrivacyLedger.from_rows(ledger_rows(state))
    for _ in digests:
        ledger = with_version(privacy, ledger)
    lost = sorted(lost_versions(state).union(digests))
    return {**(state or {}), LEDGER: ledger.as_rows(), LOST: lost}


def noise_seed(
    context: Context,
    config: training_pb2.TrainingConfig,
    training_session_id: str,
    state: Mapping[str, Any] | None,
) -> bytes | None:
    """Return the noise seed of a training session, 32 bytes; None if the coordinator adds no noise.

    Draws and stores a new seed if none can be decrypted.

    Args:
        context: The coordinator's parts.
        config: Of the training session.
        training_session_id: Whose.
        state: Its `privacy_state` as last read.

    Raises:
        TrainingSessionNotFoundError: There is no such training session.
    """
    if not config.privacy.noise_multiplier or has_noise_in_sum(config):
        return None
    known = open_seed(context, training_session_id, state)
    if known is not None:
        return known
    seed = context.draw_random(SECRET_BYTES)
    at = context.clock()

    def work(session: Session) -> bytes:
        training_session = training_sessions.lock_session(session, training_session_id)
        if training_session is None:
            raise TrainingSessionNotFoundError
        current = open_seed(context, training_session_id, training_session.privacy_state)
        if current is not None:
            return current
        sealed = encrypt(_key(context), seed, _ASSOCIATED + training_session_id.encode()).hex()
        changed = {**(training_session.privacy_state or {}), SEED: sealed}
        training_sessions.update_session(session, training_session_id, {"privacy_state": changed})
        _record(session, training_session_id, SEED in (training_session.privacy_state or {}), at)
        return seed

    return context.database.write(work)


def open_seed(
    context: Context, training_session_id: str, state: Mapping[str, Any] | None
) -> bytes | None:
    """Return the noise seed in a `privacy_state`; None if there is none that the state key decrypts."""
    sealed = (state or {}).get(SEED)
    if sealed is None:
        return None
    try:
        return decrypt(
            _key(context), bytes.fromhex(sealed), _ASSOCIATED + training_session_id.encode()
        )
    except UnsealError:
        return None


def _key(context: Context) -> bytes:
    return hkdf_expand(context.state_key, _KEY_INFO)


def _record(session: Session, training_session_id: str, is_again: bool, at: datetime) -> None:
    """Audit the drawing of a seed; high risk if it replaces one that can no longer be decrypted."""
    event = Event(
        "privacy.noise_seed_replaced" if is_again else "privacy.noise_seed_drawn",
        f"training_session:{training_session_id}",
        RiskLevel.HIGH if is_again else RiskLevel.LOW,
    )
    audit.record(session, SYSTEM, event, at)
