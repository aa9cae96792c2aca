"""Commands on devices: list, show, rename, suspend, reinstate, revoke, set-groups, confirm, rekey."""

import argparse
import uuid
from typing import Any

from qflare.references import short_id
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import device_pb2, training_pb2
from qflare_client.admin.arguments import (
    add_command,
    add_device,
    add_limit,
    add_topic,
    choice,
    show,
    show_list,
)
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import Column, metrics, moment, parse_moment, word
from qflare_client.admin.tokens import add_hand_over, check_bundle, hand_over

STATES = choice(device_pb2.DeviceState, "DEVICE_STATE_")
COMPARISONS = {
    ">=": training_pb2.COMPARISON_AT_LEAST,
    "<=": training_pb2.COMPARISON_AT_MOST,
    "=": training_pb2.COMPARISON_EQUAL,
}
DEVICE: list[Column] = [
    ("name", lambda row: row.name),
    ("id", lambda row: short_id(row.device_id)),
    ("state", lambda row: word(row, "state")),
    ("type", lambda row: row.profile.device_type),
    ("groups", lambda row: ",".join(row.groups)),
    ("capabilities", lambda row: metrics(row.profile.capabilities)),
    ("last seen", lambda row: moment(row, "last_seen_time")),
    ("registered", lambda row: moment(row, "register_time")),
    ("reason", lambda row: row.state_reason),
]
DEVICE_FACTS: list[Column] = [
    DEVICE[0],
    ("id", lambda row: row.device_id),
    *DEVICE[2:],
    ("signature key", lambda row: row.signature_key_id),
    ("kem key", lambda row: row.kem_key_id),
    ("key rotations", lambda row: row.key_rotation_count),
    ("confirmed", lambda row: moment(row, "confirm_time")),
    ("reported type", lambda row: row.reported_type),
    ("reported capabilities", lambda row: metrics(row.reported_capabilities)),
]
CHANGES = {
    "suspend": "suspend a device until it is reinstated",
    "reinstate": "lift a suspension or a quarantine",
    "revoke": "revoke a device permanently",
}


def add(commands: Any) -> None:
    """Add the commands of this topic."""
    actions = add_topic(commands, "device", "devices")
    listing = add_command(
        actions,
        "list",
        run_list,
        "list devices",
        "device list --state active --capability 'ram_mib>=2048'",
    )
    listing.add_argument("--state", choices=sorted(STATES), help="only devices in this state")
    listing.add_argument("--type", default="", help="only devices of this type")
    listing.add_argument("--group", default="", help="only devices in this group")
    listing.add_argument(
        "--seen-after", type=parse_moment, help="only devices seen since this ISO 8601 time"
    )
    listing.add_argument(
        "--capability",
        type=parse_condition,
        action="append",
        default=[],
        help="NAME>=VALUE, NAME<=VALUE or NAME=VALUE; repeatable",
    )
    add_limit(listing)
    shown = add_command(actions, "show", run_show, "show a device", "device show ward-3")
    add_device(shown)
    _add_rename(actions)
    for name, text in CHANGES.items():
        change = add_command(actions, name, run_change, text, f"device {name} ward-3 --reason lost")
        add_device(change)
        change.add_argument("--reason", default="", help="for the audit log")
        change.set_defaults(change=name)
    _add_groups(actions)
    _add_confirm(actions)
    rekey = add_command(
        actions,
        "rekey",
        run_rekey,
        "issue a token for a device that lost its keys to enroll new ones",
        "device rekey ward-3 --output device.token",
    )
    add_device(rekey)
    add_hand_over(rekey)


def _add_rename(actions: Any) -> None:
    rename = add_command(
        actions,
        "rename",
        run_rename,
        "change the name of a device",
        "device rename 5f0c31aa ward-3",
    )
    add_device(rename)
    rename.add_argument(
        "name", help="new name: 1 to 64 printable characters without spaces, that no device has"
    )
    rename.add_argument("--reason", default="", help="for the audit log")


def _add_groups(actions: Any) -> None:
    groups = add_command(
        actions,
        "set-groups",
        run_set_groups,
        "set the groups of a device",
        "device set-groups ward-3 --group cardiology --group trial",
    )
    add_device(groups)
    groups.add_argument(
        "--group",
        action="append",
        default=[],
        help="repeatable; none removes the device from all groups",
    )
    groups.add_argument("--reason", default="", help="for the audit log")


def _add_confirm(actions: Any) -> None:
    confirm = add_command(
        actions,
        "confirm",
        run_confirm,
        "confirm the type and capabilities of a device for selection",
        "device confirm ward-3 --type phone --capability ram_mib=4096",
    )
    add_device(confirm)
    confirm.add_argument(
        "--reported",
        action="store_true",
        help="start from the values that the device reports in heartbeats",
    )
    confirm.add_argument("--type", help="new type")
    confirm.add_argument(
        "--capability",
        type=parse_number,
        action="append",
        default=[],
        help="NAME=VALUE, a new or changed capability; repeatable",
    )
    confirm.add_argument("--reason", default="", help="for the audit log")


def parse_number(text: str) -> tuple[str, float]:
    """Return the name and the value of a capability from NAME=VALUE.

    Raises:
        ValueError: The text is malformed.
    """
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(text)
    return name.strip(), float(value)


def parse_condition(text: str) -> training_pb2.CapabilityFilter:
    """Return a condition on a capability from NAME>=VALUE, NAME<=VALUE or NAME=VALUE.

    Raises:
        ValueError: The text is malformed.
    """
    for sign, comparison in COMPARISONS.items():
        name, found, value = text.partition(sign)
        if found:
            return training_pb2.CapabilityFilter(
                capability=name.strip(), comparison=comparison, value=float(value)
            )
    raise ValueError(text)


def run_list(admin: Admin, options: argparse.Namespace) -> None:
    """List devices."""
    request = pb.ListDevicesRequest(
        device_type=options.type,
        seen_after_time=options.seen_after,
        capabilities=options.capability,
        group=options.group,
    )
    if options.state:
        request.state = STATES[options.state]  # type: ignore[assignment]
    answer = admin.collect("ListDevices", request, "devices", options.limit)
    show_list(options, answer, "devices", DEVICE)


def run_show(admin: Admin, options: argparse.Namespace) -> None:
    """Show a device."""
    answer = admin.call("GetDevice", pb.GetDeviceRequest(device_id=options.device))
    show(options, answer, answer.device, DEVICE_FACTS)


def run_rename(admin: Admin, options: argparse.Namespace) -> None:
    """Change the name of a device."""
    request = pb.RenameDeviceRequest(
        device_id=options.device, name=options.name, reason=options.reason
    )
    answer = admin.call("RenameDevice", request)
    show(options, answer, answer.device, DEVICE_FACTS)


def run_change(admin: Admin, options: argparse.Namespace) -> None:
    """Suspend, reinstate or revoke a device."""
    method = f"{options.change.capitalize()}Device"
    request = getattr(pb, f"{method}Request")(device_id=options.device, reason=options.reason)
    answer = admin.call(method, request)
    show(options, answer, answer.device, DEVICE_FACTS)


def run_set_groups(admin: Admin, options: argparse.Namespace) -> None:
    """Set the groups of a device."""
    request = pb.SetDeviceGroupsRequest(
        device_id=options.device, groups=options.group, reason=options.reason
    )
    answer = admin.call("SetDeviceGroups", request)
    show(options, answer, answer.device, DEVICE_FACTS)


def run_confirm(admin: Admin, options: argparse.Namespace) -> None:
    """Confirm the type and capabilities of a device."""
    known = admin.call("GetDevice", pb.GetDeviceRequest(device_id=options.device)).device
    kind, capabilities = known.profile.device_type, known.profile.capabilities
    if options.reported:
        kind, capabilities = known.reported_type, known.reported_capabilities
    request = pb.ConfirmDeviceProfileRequest(
        device_id=options.device,
        device_type=kind if options.type is None else options.type,
        capabilities={**capabilities, **dict(options.capability)},
        reason=options.reason,
    )
    answer = admin.call("ConfirmDeviceProfile", request)
    show(options, answer, answer.device, DEVICE_FACTS)


def run_rekey(admin: Admin, options: argparse.Namespace) -> None:
    """Issue a token with which a device enrolls new keys."""
    check_bundle(options)
    request = pb.IssueEnrollmentTokensRequest(
        token_count=1,
        label="rekey",
        device_id=options.device,
        request_id=uuid.uuid4().hex,
    )
    answer = admin.call("IssueEnrollmentTokens", request)
    hand_over(options, answer, list(answer.tokens))
