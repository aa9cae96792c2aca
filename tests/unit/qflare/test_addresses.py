"""An address is host:port or a gRPC name; anything else is refused with what is wanted."""

import pytest

from qflare.addresses import AddressError, require_address


@pytest.mark.parametrize(
    "address",
    [
        "localhost:50051",
        "fl.example.org:443",
        "127.0.0.1:1",
        "[::1]:50051",
        "[fe80::1%eth0]:65535",
        "host_name:80",
        "bücher.example:80",
        "unix:/run/qflare.sock",
        "unix-abstract:qflare",
        "dns:///fl.example.org:443",
        "ipv4:10.0.0.1:443,10.0.0.2:443",
        "ipv6:[::1]:443",
    ],
)
def test_addresses_with_a_port(address: str) -> None:
    assert require_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        "localhost:",
        ":50051",
        "localhost:0",
        "localhost:65536",
        "localhost:123456",
        "localhost:http",
        "local host:1",
        "localhost:1 ",
        "http://localhost:50051",
        "https://fl.example.org",
        "localhost:50051/x",
        "::1",
        "[::1]",
        "::1:50051",
        "localhost:٣",
        "localhost:50051\n",
    ],
)
def test_what_is_no_address_is_told_what_is_wanted(address: str) -> None:
    with pytest.raises(AddressError, match="want host:port, such as "):
        require_address(address)
