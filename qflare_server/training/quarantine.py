"""Quarantine: a device whose updates are rejected too often takes no part until an administrator reinstates it."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from qflare_server.storage.records import TrainingSession
from qflare_server.storage.repository import audit, devices, views
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import DeviceState, RiskLevel


def quarantine_repeaters(
    session: Session, training_session: TrainingSession, rejected: Sequence[str], now: datetime
) -> list[str]:
    """Quarantine the devices of rejected updates that have reached the training session's bound; return their ids.

    Counted are updates that were judged and rejected in this training session within its window, and since the
    device was last reinstated. The caller has marked the updates and their round.
    """
    policy = training_session.config.safeguards
    if not policy.quarantine_rejections or not rejected:
        return []
    window = timedelta(seconds=policy.quarantine_window.ToNanoseconds() / 1e9)
    found = []
    for device_id in views.devices_of(session, rejected):
        since = _since(session, device_id, now - window)
        count = views.count_rejections(session, training_session.id, device_id, since)
        if count >= policy.quarantine_rejections and _quarantine(
            session, training_session, device_id, count, now
        ):
            found.append(device_id)
    return found


def _since(session: Session, device_id: str, start: datetime) -> datetime:
    reinstated_at = views.last_event_at(session, f"device:{device_id}", "device.active")
    return start if reinstated_at is None else max(start, reinstated_at)


def _quarantine(
    session: Session, training_session: TrainingSession, device_id: str, count: int, now: datetime
) -> bool:
    """Quarantine an active device; a device in any other state is left unchanged."""
    device = devices.lock_device(session, device_id)
    if device is None or device.state != DeviceState.ACTIVE.value:
        return False
    reason = f"{count} updates rejected"
    values = {"state": DeviceState.QUARANTINED.value, "state_reason": reason}
    devices.update_device(session, device_id, values)
    details = {"training_session": training_session.id, "rejections": count}
    event = Event("device.quarantined", f"device:{device_id}", RiskLevel.HIGH, details)
    audit.record(session, SYSTEM, event, now)
    return True
