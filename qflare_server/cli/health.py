"""`health`: checks that a coordinator is serving. Imports little, since probes run it every few seconds."""

import argparse
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qflare.command_line import address, report_failure, seconds
from qflare.terminal import say
from qflare_server.config import ServerConfig
from qflare_server.errors import InvalidRequestError


def add(commands: Any) -> None:
    """Add this module's parsers."""
    health = commands.add_parser(
        "health",
        help="check that a coordinator is serving; exit code 0 if so",
        epilog="example: qflare-server health --address 127.0.0.1:50051",
    )
    health.add_argument("--address", type=address, help="default: the listening address")
    health.add_argument("--service", default="", help="service name; default: the whole server")
    health.add_argument(
        "--ca",
        type=Path,
        help="PEM file of certificate authorities; default: no TLS for an --address,"
        " the configured TLS for the listening address",
    )
    health.add_argument("--certificate", type=Path, help="PEM chain of a client, for mutual TLS")
    health.add_argument("--key", type=Path, help="PEM key of that certificate")
    health.add_argument("--timeout", type=seconds(0.001), default=5.0, help="seconds")
    health.set_defaults(run=run_health)


def run_health(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Ask the health service."""
    channel = _health_channel(config, arguments)
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=arguments.service)
        try:
            answer = stub.Check(request, timeout=arguments.timeout)
        except grpc.RpcError as error:
            cause = f"not serving: {error.code().name}"
            remedy = "the address and certificates of the coordinator, and its log"
            report_failure("qflare-server health", cause, remedy)
            return 1
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    say(name)
    return 0 if name == "SERVING" else 1


def _health_channel(config: ServerConfig, arguments: argparse.Namespace) -> grpc.Channel:
    """Connect to an address, or to the coordinator of these settings, over TLS if it uses TLS."""
    address = arguments.address or config.listen
    authorities, options = arguments.ca and arguments.ca.read_bytes(), []
    if authorities is None and not arguments.address and config.tls_certificate_file is not None:
        # Trust only its own certificate: the process on the port must hold the matching key.
        authorities = config.tls_certificate_file.read_bytes()
        options = [("grpc.ssl_target_name_override", server_name(authorities))]
    if (arguments.key is None) != (arguments.certificate is None):
        raise InvalidRequestError("--certificate and --key belong together: got one of them")
    if authorities is None:
        return grpc.insecure_channel(address)
    key = arguments.key and arguments.key.read_bytes()
    chain = arguments.certificate and arguments.certificate.read_bytes()
    credentials = grpc.ssl_channel_credentials(authorities, key, chain)
    return grpc.secure_channel(address, credentials, options=options)


def server_name(pem: bytes) -> str:
    """Return a name in a server certificate: its first DNS name, or else an IP address; empty for none.

    Raises:
        ValueError: It is not a certificate.
    """
    from cryptography import x509  # noqa: PLC0415  # a sixth of the start, and TLS only

    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    found = [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]
    return found[0].replace("*", "any", 1) if found else ""
