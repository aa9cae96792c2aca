"""TLS as it is on the wire: which key exchange is negotiated, who is refused, and certificates that change.

Devices are the real SDK. Callers that a device cannot be (no post-quantum group, TLS 1.2 only) speak HTTP/2 over
Python's `ssl`, whose groups and versions can be set.
"""

import base64
import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.rpc import error_details_pb2, status_pb2

from qflare.v1 import coordinator_service_pb2, coordinator_service_pb2_grpc
from qflare_client import (
    Client,
    InvalidArgumentError,
    Tls,
    TlsError,
    UnavailableError,
    VerificationError,
    enroll,
)
from qflare_client.rpc.diagnosis import refusal
from qflare_client.rpc.retry import RetryPolicy
from qflare_client.rpc.transport import Transport
from qflare_server.cli.certificates import Authority, issue
from qflare_server.cli.main import main
from qflare_server.context import utc_now
from tests.integration.conftest import Deployment
from tests.support.manual_pages import ROOT

Deploy = Callable[..., Deployment]
X25519MLKEM768 = 0x11EC
KEY_SHARE = 51
HANDSHAKE, CLIENT_HELLO, SERVER_HELLO = 22, 1, 2
HELLO_RETRY = bytes.fromhex("CF21AD74E59A6111BE1D8C021E65B891C2A211167ABB8C5E079E09E2C8A8339C")
ONE_ATTEMPT = RetryPolicy(total_time_s=0.0)
KEYSET = "/qflare.v1.CoordinatorService/GetKeyset"


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: transport knows nothing of databases."""
    return sqlite_url


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """Return a folder with certificates of this machine and of one device, made by the command."""
    folder = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(folder), "--client", "device"]) == 0
    return folder


@pytest.fixture
def serve_tls(deploy: Deploy, certificates: Path) -> Deploy:
    """Return a function that starts a coordinator with TLS."""

    def start(**settings: object) -> Deployment:
        files = {
            "tls_certificate_file": certificates / "server.pem",
            "tls_key_file": certificates / "server.key",
        }
        return deploy(**files, **settings)

    return start


class Relay:
    """A TCP relay in front of a coordinator that keeps the bytes of each direction of one connection."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.to_server, self.to_client = bytearray(), bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for source, sink, record in (
                (near, far, self.to_server),
                (far, near, self.to_client),
            ):
                threading.Thread(target=_copy, args=(source, sink, record), daemon=True).start()

    def close(self) -> None:
        """Take no further connection."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def _copy(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    with source, sink:
        try:
            while data := source.recv(65_536):
                record += data
                sink.sendall(data)
        except OSError:
            return


@contextmanager
def relayed(target: str) -> Iterator[Relay]:
    """Yield a relay in front of an address."""
    relay = Relay(target)
    try:
        yield relay
    finally:
        relay.close()


def first_handshake_message(stream: bytes) -> tuple[int, bytes]:
    """Return type and body of the first handshake message of a recorded TLS stream (RFC 8446 section 4)."""
    fragments, start = b"", 0
    while len(fragments) < 4 or len(fragments) < 4 + int.from_bytes(fragments[1:4], "big"):
        assert stream[start] == HANDSHAKE
        length = int.from_bytes(stream[start + 3 : start + 5], "big")
        fragments += stream[start + 5 : start + 5 + length]
        start += 5 + length
    return fragments[0], fragments[4 : 4 + int.from_bytes(fragments[1:4], "big")]


class Fields:
    """Reads length-prefixed fields one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        taken, self.data = self.data[:count], self.data[count:]
        assert len(taken) == count
        return taken

    def number(self, count: int) -> int:
        """Return the next bytes as a number."""
        return int.from_bytes(self.take(count), "big")

    def vector(self, count: int) -> bytes:
        """Return a field whose length stands before it in so many bytes."""
        return self.take(self.number(count))


def extensions(data: bytes) -> dict[int, bytes]:
    """Return the extensions of a hello by their type."""
    found, fields = {}, Fields(data)
    while fields.data:
        kind = fields.number(2)
        found[kind] = fields.vector(2)
    return found


def client_shares(stream: bytes) -> dict[int, int]:
    """Return the length of each key share of a ClientHello by its group."""
    kind, body = first_handshake_message(stream)
    assert kind == CLIENT_HELLO
    fields = Fields(body)
    fields.take(2 + 32)
    fields.vector(1), fields.vector(2), fields.vector(1)
    shares, entries = {}, Fields(Fields(extensions(fields.vector(2))[KEY_SHARE]).vector(2))
    while entries.data:
        group = entries.number(2)
        shares[group] = len(entries.vector(2))
    return shares


def server_share(stream: bytes) -> tuple[int, int]:
    """Return group and length of the key share of a ServerHello."""
    kind, body = first_handshake_message(stream)
    assert kind == SERVER_HELLO
    fields = Fields(body)
    fields.take(2)
    assert fields.take(32) != HELLO_RETRY
    fields.vector(1), fields.take(2 + 1)
    share = Fields(extensions(fields.vector(2))[KEY_SHARE])
    return share.number(2), len(share.vector(2))


def tls_context(ca_file: Path) -> ssl.SSLContext:
    """Return settings of a caller that speaks HTTP/2."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["h2"])
    return context


def call(address: str, context: ssl.SSLContext, path: str = KEYSET) -> tuple[int, str]:
    """Make a unary call with an empty request, and return gRPC status and reason."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as stream,
    ):
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        connection.send_headers(1, _request_headers(path))
        connection.send_data(1, bytes(5), end_stream=True)
        stream.sendall(connection.data_to_send())
        headers = _answer(connection, stream)
    details = headers.get("grpc-status-details-bin", "")
    return int(headers["grpc-status"]), _reason(details)


def _request_headers(path: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "localhost"),
        (":path", path),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]


def _answer(connection: h2.connection.H2Connection, stream: ssl.SSLSocket) -> dict[str, str]:
    headers: dict[str, str] = {}
    while True:
        data = stream.recv(65_536)
        assert data, "the server closed the connection"
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                headers |= {str(name): str(value) for name, value in event.headers}
            if isinstance(event, h2.events.DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, 1)
            if isinstance(event, h2.events.StreamEnded):
                return headers
        stream.sendall(connection.data_to_send())


def _reason(details: str) -> str:
    status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "")


def enrolled(
    deployment: Deployment, folder: Path, tls: Tls, address: str, **settings: Any
) -> Client:
    """Enroll a device over TLS and return its client."""
    bundle = deployment.bundle()
    enroll(bundle, home=folder / "device", address=address, tls=tls, retry=ONE_ATTEMPT)
    return Client(home=folder / "device", tls=tls, retry=ONE_ATTEMPT, **settings)


def trusting(certificates: Path, *, client: bool = False) -> Tls:
    """Return TLS settings of a device that trusts the made authority."""
    certificate, key = (
        (certificates / "device.pem", certificates / "device.key") if client else (None, None)
    )
    return Tls.from_files(certificates / "ca.pem", certificate, key, "localhost")


def test_a_device_negotiates_x25519mlkem768(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    deployment = serve_tls(require_pq_tls=True)
    with relayed(deployment.coordinator.address) as relay:
        tls = trusting(certificates)
        with enrolled(deployment, tmp_path, tls, relay.address, require_pq_tls=True) as client:
            assert client.heartbeat().device_state == "active"
        assert client_shares(bytes(relay.to_server))[X25519MLKEM768] == 1184 + 32
        assert server_share(bytes(relay.to_client)) == (X25519MLKEM768, 1088 + 32)


def test_no_secret_of_the_enrollment_passes_in_the_open(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    deployment = serve_tls()
    with relayed(deployment.coordinator.address) as relay:
        bundle = deployment.bundle()
        enroll(bundle, home=tmp_path / "d", address=relay.address, tls=trusting(certificates))
        recorded = bytes(relay.to_server + relay.to_client)
    assert bundle.enrollment_token.encode() not in recorded
    assert b"CoordinatorService" not in recorded


def test_a_caller_with_the_group_is_served_without_the_rule_and_with_it(
    serve_tls: Deploy, certificates: Path
) -> None:
    deployment = serve_tls(require_pq_tls=True)
    credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
    with grpc.secure_channel(deployment.coordinator.address, credentials) as channel:
        stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(channel)
        assert stub.GetKeyset(coordinator_service_pb2.GetKeysetRequest()).bundle.roots


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_classical_key_exchange_is_refused(
    serve_tls: Deploy, certificates: Path, version: ssl.TLSVersion
) -> None:
    deployment = serve_tls(require_pq_tls=True)
    context = tls_context(certificates / "ca.pem")
    context.set_ecdh_curve("prime256v1")
    context.minimum_version = context.maximum_version = version
    code, reason = call(deployment.coordinator.address, context)
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED.value[0], "PERMISSION_DENIED")


def test_a_classical_key_exchange_is_served_without_the_rule(
    serve_tls: Deploy, certificates: Path
) -> None:
    deployment = serve_tls()
    context = tls_context(certificates / "ca.pem")
    context.set_ecdh_curve("prime256v1")
    assert call(deployment.coordinator.address, context) == (0, "")


def test_a_device_that_asks_for_the_group_refuses_a_coordinator_without_tls(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy()
    enroll(deployment.bundle(), home=tmp_path / "d")
    with (
        Client(home=tmp_path / "d", retry=ONE_ATTEMPT, require_pq_tls=True) as client,
        pytest.raises(VerificationError, match="TLS group"),
    ):
        client.heartbeat()


def test_a_device_refuses_a_certificate_of_another_authority(
    serve_tls: Deploy, tmp_path: Path
) -> None:
    deployment = serve_tls()
    main(["certificates", "make", "--output", str(tmp_path / "other")])
    tls = trusting(tmp_path / "other")
    with pytest.raises(UnavailableError):
        enrolled(deployment, tmp_path, tls, deployment.coordinator.address)


def test_a_device_refuses_a_certificate_of_another_name(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    deployment = serve_tls()
    tls = Tls((certificates / "ca.pem").read_bytes(), server_name="elsewhere.example.org")
    with pytest.raises(UnavailableError):
        enrolled(deployment, tmp_path, tls, deployment.coordinator.address)


def test_mutual_tls_serves_a_device_with_a_certificate(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    deployment = serve_tls(tls_client_ca_file=certificates / "ca.pem")
    tls = trusting(certificates, client=True)
    with enrolled(deployment, tmp_path, tls, deployment.coordinator.address) as client:
        assert client.heartbeat().device_state == "active"


def test_a_device_keeps_the_authorities_of_its_bundle_beside_its_certificate(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    authority = (certificates / "ca.pem").read_text()
    deployment = serve_tls(tls_client_ca_file=certificates / "ca.pem")
    bundle = deployment.bundle()
    bundle.certificate_authorities = authority
    bundle.address = localhost(deployment)
    own = Tls.from_files(None, certificates / "device.pem", certificates / "device.key")

    facts = enroll(bundle, home=tmp_path / "device", tls=own, retry=ONE_ATTEMPT)

    assert facts.certificate_authorities == authority
    for _restart in range(2):
        with Client(home=tmp_path / "device", tls=own, retry=ONE_ATTEMPT) as client:
            assert client.heartbeat().device_state == "active"


def localhost(deployment: Deployment) -> str:
    """Return the coordinator's address with the name that its certificate holds."""
    return f"localhost:{deployment.coordinator.address.rpartition(':')[2]}"


def foreign(certificates: Path, folder: Path) -> Tls:
    """Return the settings of a device with a certificate of another authority."""
    main(["certificates", "make", "--output", str(folder), "--client", "device"])
    return Tls.from_files(
        certificates / "ca.pem", folder / "device.pem", folder / "device.key", "localhost"
    )


def expired(certificates: Path, folder: Path) -> Tls:
    """Return the settings of a device with a certificate that has expired."""
    authority, usage = Authority.ensure(certificates, utc_now()), ExtendedKeyUsageOID.CLIENT_AUTH
    folder.mkdir()
    long_ago = utc_now() - timedelta(days=3)
    issue(authority, folder, "device", (), usage, long_ago, timedelta(days=1))
    return Tls.from_files(
        certificates / "ca.pem", folder / "device.pem", folder / "device.key", "localhost"
    )


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (lambda made, _folder: trusting(made), "only connections with a client certificate"),
        (foreign, "refuses the client certificate"),
        (expired, "refuses the client certificate"),
        (lambda _made, _folder: None, "the coordinator speaks TLS at this address"),
    ],
    ids=["none", "foreign", "expired", "plaintext"],
)
def test_a_permanent_refusal_ends_at_once_with_its_cause(
    serve_tls: Deploy,
    certificates: Path,
    tmp_path: Path,
    settings: Callable[[Path, Path], Tls | None],
    cause: str,
) -> None:
    deployment = serve_tls(tls_client_ca_file=certificates / "ca.pem")
    tls = settings(certificates, tmp_path / "other")

    with pytest.raises(TlsError, match=cause) as refusal:  # with the patience of a minute
        enroll(
            deployment.bundle(),
            home=tmp_path / "device",
            address=localhost(deployment),
            tls=tls,
            insecure=tls is None,
        )

    assert refusal.value.retry_after_s is None


def test_a_coordinator_that_is_away_is_no_permanent_refusal(certificates: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    tls = trusting(certificates, client=True)

    assert refusal("127.0.0.1", port, tls, threading.Event().wait) is None
    with (
        closing(Transport(f"localhost:{port}", tls=tls)) as line,
        pytest.raises(UnavailableError) as away,
    ):
        line.unary(line.stub.GetKeyset, coordinator_service_pb2.GetKeysetRequest())
    assert not isinstance(away.value, TlsError)


def test_a_coordinator_that_serves_is_no_permanent_refusal(
    serve_tls: Deploy, certificates: Path
) -> None:
    deployment = serve_tls(tls_client_ca_file=certificates / "ca.pem")
    port = int(deployment.coordinator.address.rpartition(":")[2])
    tls = trusting(certificates, client=True)

    assert refusal("localhost", port, tls, threading.Event().wait) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"certificate_chain": b"chain"},
        {"private_key": b"key"},
        {"certificate_authorities": b""},
        {"certificate_chain": b"", "private_key": b""},
    ],
)
def test_halves_and_empty_files_are_refused_before_a_connection(
    settings: dict[str, Any],
) -> None:
    with pytest.raises(InvalidArgumentError):
        Tls(**settings)


def test_mutual_tls_refuses_a_device_without_a_certificate(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    deployment = serve_tls(tls_client_ca_file=certificates / "ca.pem")
    with pytest.raises(UnavailableError):
        enrolled(deployment, tmp_path, trusting(certificates), deployment.coordinator.address)


def test_mutual_tls_refuses_a_certificate_of_another_authority(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    deployment = serve_tls(tls_client_ca_file=certificates / "ca.pem")
    other = tmp_path / "other"
    main(["certificates", "make", "--output", str(other), "--client", "device"])
    tls = Tls.from_files(
        certificates / "ca.pem", other / "device.pem", other / "device.key", "localhost"
    )
    with pytest.raises(UnavailableError):
        enrolled(deployment, tmp_path, tls, deployment.coordinator.address)


def served_serial(address: str, certificates: Path) -> int:
    """Return the serial number of the certificate that a fresh connection is shown."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        tls_context(certificates / "ca.pem").wrap_socket(
            plain, server_hostname="localhost"
        ) as stream,
    ):
        shown = stream.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def serial_of(certificates: Path) -> int:
    """Return the serial number of the server certificate in a folder."""
    return x509.load_pem_x509_certificate((certificates / "server.pem").read_bytes()).serial_number


def test_renewed_certificates_are_taken_over_by_the_next_connection(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    deployment = serve_tls()
    address = deployment.coordinator.address
    before = serial_of(certificates)
    assert served_serial(address, certificates) == before
    with enrolled(deployment, tmp_path, trusting(certificates), address) as client:
        client.heartbeat()
        main(["certificates", "make", "--output", str(certificates)])
        after = serial_of(certificates)
        assert served_serial(address, certificates) == after != before
        client.heartbeat()  # its connection goes on


def test_certificate_files_that_vanish_leave_the_ones_in_use(
    serve_tls: Deploy, certificates: Path
) -> None:
    deployment = serve_tls()
    before = serial_of(certificates)
    (certificates / "server.pem").unlink()
    assert served_serial(deployment.coordinator.address, certificates) == before


def test_half_renewed_files_leave_the_pair_in_use(serve_tls: Deploy, certificates: Path) -> None:
    deployment = serve_tls()
    before = serial_of(certificates)
    other_key = (certificates / "device.key").read_bytes()
    (certificates / "server.key").write_bytes(other_key)
    assert served_serial(deployment.coordinator.address, certificates) == before


def test_an_expired_certificate_is_refused_by_a_device(
    serve_tls: Deploy, certificates: Path, tmp_path: Path
) -> None:
    authority = Authority.ensure(certificates, utc_now())
    long_ago = utc_now() - timedelta(days=3)
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    issue(authority, certificates, "server", ["localhost"], usage, long_ago, timedelta(days=1))
    deployment = serve_tls()
    with pytest.raises(UnavailableError):
        enrolled(deployment, tmp_path, trusting(certificates), deployment.coordinator.address)


def test_making_certificates_again_keeps_the_authority(certificates: Path) -> None:
    before = (certificates / "ca.pem").read_bytes()
    main(["certificates", "make", "--output", str(certificates)])
    assert (certificates / "ca.pem").read_bytes() == before


def test_private_keys_are_readable_by_their_owner_only(certificates: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in certificates.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {
        "ca.key",
        "server.key",
        "device.key",
    }


@pytest.mark.parametrize(
    "arguments", [["--client", "../x"], ["--client", "ca"], ["--client", "server"]]
)
def test_senseless_arguments_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    assert main(["certificates", "make", "--output", str(tmp_path / "c"), *arguments]) == 1


def test_a_lifetime_of_no_days_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["certificates", "make", "--output", str(tmp_path / "c"), "--days", "0"])


@pytest.mark.parametrize("hosts", [("localhost",), ("*.example.org",), ("192.0.2.7",)])
def test_the_health_command_asks_its_own_coordinator_over_tls(
    deploy: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hosts: tuple[str, ...],
) -> None:
    authority = Authority.ensure(tmp_path, utc_now())
    lifetime = timedelta(days=1)
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    certificate, key = authority.sign("server", hosts, usage, utc_now(), lifetime)
    (tmp_path / "leaf.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (tmp_path / "leaf.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    files = {
        "tls_certificate_file": tmp_path / "leaf.pem",
        "tls_key_file": tmp_path / "leaf.key",
    }
    deployment = deploy(**files)
    for name, path in files.items():
        monkeypatch.setenv(f"QFLARE_{name.upper()}", str(path))
    monkeypatch.setenv("QFLARE_LISTEN", deployment.coordinator.address)
    assert main(["health"]) == 0


def test_the_health_command_asks_another_address_with_an_authority(
    serve_tls: Deploy, certificates: Path
) -> None:
    address = serve_tls().coordinator.address
    assert main(["health", "--address", address, "--ca", str(certificates / "ca.pem")]) == 0
    assert main(["health", "--address", address, "--timeout", "1"]) == 1


def test_the_health_command_shows_a_client_certificate(
    serve_tls: Deploy, certificates: Path
) -> None:
    address = serve_tls(tls_client_ca_file=certificates / "ca.pem").coordinator.address
    asked = ["health", "--address", address, "--ca", str(certificates / "ca.pem")]
    client = ["--certificate", str(certificates / "device.pem")]
    client += ["--key", str(certificates / "device.key")]
    assert main([*asked, *client]) == 0
    assert main([*asked, "--timeout", "1"]) == 1


def administrate(program: str, address: str, certificates: Path, token: str, **go: str) -> Any:
    """List the training sessions with one of the Go programs; return the finished process."""
    method = "qflare.v1.AdminService/ListTrainingSessions"
    authority = str(certificates / "ca.pem")
    bearer = f"Bearer {token}"
    flags = {
        "grpcurl": ["-cacert", authority, "-H", f"authorization: {bearer}", address, method],
        "ghz": [
            *("--cacert", authority, "--metadata", json.dumps({"authorization": bearer})),
            *("--proto", str(ROOT / "protos/qflare/v1/admin_service.proto")),
            *("--import-paths", str(ROOT / "protos"), "--call", method, "--total", "1"),
            *("--format", "json", address),
        ],
    }
    return subprocess.run(
        [program, *flags[Path(program).name]],
        env={**os.environ, "GODEBUG": "", **go},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("name", ["grpcurl", "ghz"])
def test_the_go_programs_of_the_repository_negotiate_x25519mlkem768(
    name: str, request: pytest.FixtureRequest, serve_tls: Deploy, certificates: Path
) -> None:
    program = request.getfixturevalue(name)
    deployment = serve_tls(require_pq_tls=True)
    address, token = deployment.coordinator.address, deployment.admin_token

    done = administrate(program, address, certificates, token)
    classical = administrate(program, address, certificates, token, GODEBUG="tlsmlkem=0")

    assert done.returncode == 0, done.stderr
    assert "PermissionDenied" not in done.stdout
    assert "PermissionDenied" in classical.stdout + classical.stderr
