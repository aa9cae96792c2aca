"""Addresses of a coordinator, as clients are given them: host:port, or a name of gRPC's with its scheme."""

import ipaddress
import re
from typing import Final

MAX_PORT: Final = 65_535
SCHEMES: Final = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "vsock:")
"""Schemes of gRPC names (github.com/grpc/grpc, doc/naming.md); what follows them is checked by gRPC."""
_HOST_AND_PORT: Final = re.compile(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


class AddressError(ValueError):
    """An address has no host or no port. Its text says what is wanted."""


def require_address(address: str) -> str:
    """Return an address that has a host and a port, or a scheme of gRPC's.

    gRPC would take port 443 where there is none, and fail to connect there.

    Raises:
        AddressError: The address has no host, no port, or a scheme of the web.
    """
    found = _HOST_AND_PORT.fullmatch(address)
    if address.startswith(SCHEMES) or (found and 1 <= int(found[1]) <= MAX_PORT):
        return address
    hint = "[::1]:50051" if address.count(":") > 1 and "//" not in address else "localhost:50051"
    raise AddressError(f"address: got {address[:200]!r}, want host:port, such as {hint}")


def is_loopback(address: str) -> bool:
    """Return whether an address is on this machine: host:port, unix:path, or several as ipv4:IP:PORT,IP:PORT."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    if address.startswith(("ipv4:", "ipv6:")):
        return all(is_loopback(one) for one in address[5:].split(","))
    return is_loopback_host(_host_of(address))


def _host_of(address: str) -> str:
    """Return the host of host:port; an IPv6 address with a port is in brackets."""
    bracketed = re.fullmatch(r"\[([^]]*)\](?::\d+)?", address)
    if bracketed is not None:
        return bracketed[1]
    return address.partition(":")[0] if address.count(":") == 1 else address


def is_loopback_host(host: str) -> bool:
    """Return whether a host is localhost, in any case, or a loopback address; other names are not resolved."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
