"""Encoding of devices and tokens."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from qflare.v1 import admin_service_pb2, device_pb2, training_pb2
from qflare_server.serving.rpc.encoding.values import _numbers, _texts, state_name, timestamp
from qflare_server.storage.records import Device, UserToken
from qflare_server.use_cases.access.tokens import IssuedToken


def device(row: Device, groups: Sequence[str] = ()) -> device_pb2.Device:
    """Encode a device with its groups."""
    message = device_pb2.Device(
        device_id=row.id,
        name=row.name,
        state=device_state(row.state),
        state_reason=row.state_reason,
        signature_key_id=row.signature_key_id or "",
        kem_key_id=row.kem_key_id or "",
        key_rotation_count=row.key_rotation_count,
        register_time=timestamp(row.registered_at),
        last_seen_time=timestamp(row.last_seen_at),
        groups=groups,
        reported_type=row.device_type if row.reported_type is None else row.reported_type,
        confirm_time=timestamp(row.confirmed_at),
    )
    reported = row.reported_capabilities
    message.reported_capabilities.update(
        _numbers(row.capabilities if reported is None else reported)
    )
    profile = message.profile  # filled in place: a message passed to a constructor is copied
    profile.device_type = row.device_type
    profile.hardware_info.update(_texts(row.hardware_info))
    profile.network_info.update(_texts(row.network_info))
    profile.capabilities.update(_numbers(row.capabilities))
    defaults = profile.training_defaults
    defaults.local_epochs = row.local_epochs
    defaults.batch_size = row.batch_size
    defaults.learning_rate = row.learning_rate
    return message


def token(
    row: UserToken, names: Mapping[str, str] = MappingProxyType({})
) -> admin_service_pb2.Token:
    """Encode a token without its secret, with the present name of its device."""
    return admin_service_pb2.Token(
        token_id=row.id,
        kind=admin_service_pb2.TokenKind.Value(f"TOKEN_KIND_{row.kind.upper()}"),
        subject=row.subject,
        roles=row.roles,
        create_time=timestamp(row.created_at),
        expire_time=timestamp(row.expires_at),
        use_time=timestamp(row.used_at),
        last_use_time=timestamp(row.last_used_at),
        revoke_time=timestamp(row.revoked_at),
        revoke_reason=row.revoked_reason,
        groups=row.device_groups or (),
        device_name=names.get(row.device_id or "", ""),
    )


def issued_token(issued: IssuedToken) -> admin_service_pb2.IssuedToken:
    """Encode a new token with its secret."""
    return admin_service_pb2.IssuedToken(token=token(issued.token), secret=issued.secret)


def conditions(
    filters: Iterable[training_pb2.CapabilityFilter],
) -> tuple[tuple[str, str, float], ...]:
    """Decode conditions on capabilities."""
    return tuple(
        (
            item.capability,
            state_name("COMPARISON_", item.comparison, training_pb2.Comparison) or "at_least",
            item.value,
        )
        for item in filters
    )


def device_state(state: str) -> device_pb2.DeviceState.ValueType:
    """Encode the state of a device."""
    return device_pb2.DeviceState.Value(f"DEVICE_STATE_{state.upper()}")
