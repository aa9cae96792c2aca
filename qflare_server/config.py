"""Configuration of one coordinator process, read once from `QFLARE_*`.

Every limit is a field with its unit in its name and a safe default. Secrets are passed as file paths or inside the
database URL, which is excluded from the repr. An unknown `QFLARE_*` name is an error, because a typo would silently
leave a limit at its default.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, get_type_hints
from urllib.parse import urlsplit

ENVIRONMENT_PREFIX: Final = "QFLARE_"
CLIENT_NAMES: Final = frozenset(
    {"QFLARE_HOME", "QFLARE_TOKEN", "QFLARE_PROFILE", "QFLARE_PASSPHRASE_FILE"}
)
WORKER_VARIABLE: Final = "QFLARE_WORKER"
"""Set by the supervisor: the index of this worker process."""
LIFELINE_VARIABLE: Final = "QFLARE_LIFELINE"
"""Set by the supervisor: a file descriptor that reaches end-of-file when the supervisor exits."""
NOT_SETTINGS: Final = frozenset({"QFLARE_REQUIRE_ALL", WORKER_VARIABLE, LIFELINE_VARIABLE})
"""Variables with the same prefix that tests and worker processes use."""
UNIX_SOCKETS: Final = ("unix:", "unix-abstract:")
ONLINE_ALGORITHMS: Final = ("ml-dsa-44", "ml-dsa-65", "ml-dsa-87", "ml-dsa-65-ed25519")
ROOT_ALGORITHMS: Final = (*ONLINE_ALGORITHMS, "slh-dsa-sha2-128s")
OIDC_ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "Ed25519", "EdDSA"),
)
WEBHOOK_EVENTS: Final = (
    *("round.published", "training_session.ended"),
    *("device.quarantined", "privacy.budget_nearly_spent"),
)
MAX_WEBHOOKS: Final = 8
OIDC_ROLES: Final = ("viewer", "operator", "admin", "auditor")
SERVICE_LINK: Final = re.compile(
    r"QFLARE_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
SERVICE_URL: Final = re.compile(r"(?:tcp|udp|sctp)://\S+:\d+")
TRUE: Final = frozenset({"1", "true", "yes", "on"})
MAX_PORT: Final = 65_535
FALSE: Final = frozenset({"0", "false", "no", "off"})


class ConfigError(Exception):
    """Invalid configuration. Never sent over the wire.

    Args:
        message: All problems, one per line.
        remedy: Advice for this error; empty means a pointer to the manual.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy or "docs/operations.md, which lists every setting and its range"


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a coordinator. `from_env` reads them from the environment; command-line flags override them."""

    data_dir: Path = Path("qflare-data")
    """Folder of the SQLite database, the payloads and the key store."""
    database_url: str = field(default="", repr=False)
    """SQLAlchemy URL, sqlite:///FILE or postgresql://...; empty means an SQLite file in data_dir."""
    database_pool_size: int = 24
    """Connections to the database, 1 to 1000."""
    database_timeout_s: float = 10.0
    """Seconds to wait for a connection, a lock or a commit."""
    payload_store: str = ""
    """Where new large payloads are stored: files, database or object. Empty means files with an SQLite database,
    database with PostgreSQL. Payloads that exist stay where they are until `qflare-server payloads move`.
    """
    payload_dir: Path | None = None
    """Folder of the payload store files, on a local disk; default: the folder payloads in data_dir."""
    object_store_url: str = ""
    """Bucket of the payload store object: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. Needs
    `qflare[object-store]`.
    """
    object_store_endpoint: str = ""
    """URL of the service for a store other than the provider's own: https, or http on loopback."""
    object_store_region: str = ""
    """Region of an S3 bucket; empty means AWS_REGION, or us-east-1."""
    object_store_credentials_file: Path | None = None
    """File with the credentials of the object store, readable by its owner only; without it, they come from the
    provider's environment variables or from the instance.
    """
    object_store_timeout_s: float = 30.0
    """Seconds for one attempt of a request to the object store, 0.1 to 100; a failed request is repeated for
    three times as long.
    """
    auto_migrate: bool = False
    """Migrate the database schema at startup; an empty SQLite file is always migrated."""

    listen: str = "127.0.0.1:50051"
    """Address of the gRPC server: host:port, where port 0 selects a free port, unix:PATH or unix-abstract:NAME."""
    health_listen: str = ""
    """Address of a separate plaintext listener for the gRPC health service, such as 0.0.0.0:50052, for Kubernetes
    probes and load balancers; empty means none.
    """
    realm: str = "qflare"
    """Name of this deployment, included in every signed statement."""
    root_algorithm: str = ""
    """Algorithm of new root keys: ml-dsa-44, ml-dsa-65, ml-dsa-87, ml-dsa-65-ed25519 or slh-dsa-sha2-128s; empty means
    ml-dsa-87 for the first keys and the current algorithm for rotations.
    """
    online_algorithm: str = ""
    """Algorithm of new online signature keys: ml-dsa-44, ml-dsa-65, ml-dsa-87 or ml-dsa-65-ed25519; empty means
    ml-dsa-65 for the first keys and the current algorithm for rotations.
    """
    device_algorithms: str = "ml-dsa-44,ml-dsa-65,ml-dsa-87,ml-dsa-65-ed25519"
    """Accepted signature algorithms of devices, comma-separated. A device with another algorithm can only log in and
    rotate its keys.
    """
    key_dir: Path | None = None
    """Folder of the coordinator's keys; default: the folder keys in data_dir."""
    key_passphrase_file: Path | None = None
    """File with the passphrase of the online keys; default: online.passphrase in the key folder."""
    pkcs11_module: Path | None = None
    """Shared library of the PKCS#11 module that protects the online keys; without it, only a passphrase protects them.
    """
    pkcs11_token: str = "qflare"  # noqa: S105 - a label, no secret
    """Label of the PKCS#11 token."""
    pkcs11_pin_file: Path | None = None
    """File with the user PIN of the PKCS#11 token."""
    pkcs11_signing: bool = True
    """Keep signature keys in the token, which has to support ML-DSA; if off, the token only encrypts the key file's
    passphrase.
    """
    tls_certificate_file: Path | None = None
    """PEM certificate chain of the server; without it, the server listens on loopback addresses only."""
    tls_key_file: Path | None = None
    """PEM private key of the server."""
    tls_client_ca_file: Path | None = None
    """PEM certificates of the authorities that issue client certificates; setting it enables mutual TLS."""
    allow_insecure: bool = False
    """Serve without TLS on any address; use it only behind a proxy that terminates TLS."""
    require_pq_tls: bool = False
    """Refuse connections that did not negotiate X25519MLKEM768."""
    require_pop: bool = False
    """Refuse device calls without a proof of possession; use it behind a proxy that terminates TLS."""
    require_signatures: bool = True
    """Refuse updates without a device signature; disable it only to measure the cost of signatures."""
    reflection: bool = True
    """Serve gRPC server reflection."""
    workers: int = 1
    """Worker processes that share the port, 1 to 64."""

    rpc_threads: int = 32
    """Threads for short device calls, 4 to 512."""
    anonymous_threads: int = 8
    """Threads for unauthenticated callers, 1 to 128: enrollment, login, and tokens not seen before."""
    admin_threads: int = 8
    """Threads for short administrator calls, 1 to 128."""
    max_uploads: int = 16
    """Concurrent uploads of more than one message, 1 to 512; each uses a thread."""
    max_downloads: int = 16
    """Concurrent downloads, 1 to 512; each uses a thread."""
    min_transfer_bytes_per_s: float = 131_072.0
    """Minimum rate of an upload or a download while others wait for its slot."""
    first_message_timeout_s: float = 3.0
    """Seconds within which the complete first message of a call has to arrive."""
    max_waiting_calls: int = 1000
    """Calls per class of callers that may wait for their first message; the same number may wait for a thread."""
    max_waiting_calls_per_caller: int = 256
    """Calls per caller that may wait for a thread; a caller is a device, an administrator, or an address without a
    credential.
    """
    max_connections: int = 10_000
    """Concurrent connections, 1 to 1000000; lowered to the process's limit of open files."""
    max_streams_per_connection: int = 100
    """Concurrent calls per connection, 1 to 10000."""
    idle_connection_s: float = 150.0
    """Seconds without a call after which a connection is closed."""
    connection_age_s: float = 3600.0
    """Maximum age of a connection in seconds; it then accepts no new calls and closes after the last one."""
    max_streams_per_device: int = 4
    """Concurrent streams per device."""
    max_watchers: int = 4
    """Concurrent watches of training sessions by administrators, 1 to 64; each uses a thread."""
    watch_s: float = 600.0
    """Maximum duration of one watch call; the caller then calls again."""
    watch_poll_s: float = 0.25
    """Seconds between database queries of a watch."""
    max_calls_per_second: float = 200.0
    """Calls per second and device, averaged over ten seconds; 0 means no limit."""
    max_device_records_per_hour: int = 120
    """Permanent records per device and hour, counted separately for logins, token refreshes, key rotations and profile
    changes; 0 means no limit.
    """
    max_message_bytes: int = 4 * 2**20
    """Largest accepted gRPC message; chunks are 1 MiB."""
    max_payload_bytes: int = 8 * 2**30
    """Largest model or update."""
    max_tensors: int = 10_000
    """Maximum number of tensors per model."""
    inline_payload_bytes: int = 2**18
    """Payloads up to this size are committed together with their row; larger ones are committed chunk by chunk before
    it.
    """
    upload_batch_bytes: int = 4 * 2**20
    """Bytes of an upload per database transaction."""
    stall_timeout_s: float = 30.0
    """Seconds without progress after which a stream is canceled."""
    upload_expiry_s: float = 3600.0
    """Seconds after which an unfinished upload is discarded."""

    access_token_s: float = 900.0
    """Lifetime of an access token."""
    refresh_token_s: float = 604_800.0
    """Lifetime of a refresh token."""
    enrollment_token_s: float = 86_400.0
    """Default lifetime of an enrollment token."""
    last_seen_interval_s: float = 10.0
    """Seconds between writes of the devices' last-seen times."""

    polls_per_second: float = 500.0
    """Target rate of polls from all devices together; the coordinator sets the poll delay in GetTask accordingly."""
    min_poll_s: float = 0.02
    """Minimum poll delay of a device."""
    max_poll_s: float = 300.0
    """Maximum poll delay of a device."""

    helper_dir: Path | None = None
    """Folder with the bundles of the helpers for secure aggregation: JSON files that `qflare-helper init` writes. They
    are read again when they change.
    """
    helper_timeout_s: float = 120.0
    """Deadline of one request to a helper, in seconds."""
    helper_wait_s: float = 600.0
    """Seconds after the closing of a round within which its helpers must answer; otherwise the round fails."""

    worker_poll_s: float = 0.25
    """Seconds between database polls of an idle aggregation worker."""
    lease_s: float = 15.0
    """Seconds after which another coordinator takes over the work of a crashed one."""
    fold_slice_bytes: int = 2**30
    """Bytes of updates per slice of a large round. All coordinators on one PostgreSQL database aggregate a round whose
    updates are larger together, slice by slice; 0 means that one coordinator does.
    """
    drain_s: float = 20.0
    """Grace period for running calls after SIGTERM, in seconds."""
    inactive_after_s: float = 2_592_000.0
    """Seconds without a call after which a device counts as inactive; 0 means never."""

    witness_file: Path | None = None
    """File, preferably on another machine, to which every signed audit-log head is appended."""

    metrics_listen: str = ""
    """Address of the HTTP server for Prometheus metrics, such as 127.0.0.1:9464; empty means none. Worker i uses the
    port plus i. On a non-loopback address it serves HTTPS with the certificate of the gRPC server.
    """
    metrics_insecure: bool = False
    """Serve metrics without TLS on any address; use it only on a network that nothing but Prometheus can reach."""
    metrics_hosts: str = ""
    """Accepted host names of the metrics port, comma-separated, in addition to IP addresses, localhost, the host of its
    address and the names of its certificate.
    """
    dashboard: str = ""
    """Address of the read-only web dashboard, such as 127.0.0.1:8080; empty means none. With several workers, the first
    serves it.
    """
    dashboard_behind_proxy: bool = False
    """Serve the dashboard without TLS on any address, behind a proxy that terminates TLS, and read the browser's
    address from the last entry of X-Forwarded-For.
    """
    dashboard_hosts: str = ""
    """Accepted host names of the dashboard, comma-separated, in addition to IP addresses, localhost, the host of its
    address and the names of its certificate: behind a proxy, the proxy's public name.
    """
    dashboard_login_s: float = 28_800.0
    """Lifetime of a dashboard login."""

    oidc_issuer: str = ""
    """URL of the OpenID Connect provider of administrators, exactly as in its tokens; https, or http on loopback. Empty
    means that only tokens of this coordinator are accepted.
    """
    oidc_algorithms: str = ""
    """Accepted signature algorithms of the provider, comma-separated, of RS256, RS384, RS512, PS256, PS384, PS512,
    ES256, ES384, ES512, Ed25519 and EdDSA. There is no default, because none of them resists a quantum computer.
    """
    oidc_client_id: str = ""
    """Client of the dashboard at the provider."""
    oidc_client_secret_file: Path | None = None
    """File with the secret of that client, readable by its owner only; without it, the client is a public one."""
    oidc_command_line_client_id: str = ""
    """Public client of qflare-admin at the provider; empty means the client of the dashboard."""
    oidc_audience: str = ""
    """Accepted audiences of tokens, comma-separated; empty means both clients."""
    oidc_roles_claim: str = "roles"
    """Claim with the user's roles or groups: a text or a list; dots separate the names of nested claims."""
    oidc_roles: str = ""
    """Roles by value of that claim, such as fl-admins=admin,fl-auditors=auditor; roles are viewer, operator, admin and
    auditor.
    """
    oidc_ca_file: Path | None = None
    """PEM certificates of the authorities to trust for the provider; default: those of the system."""
    webhook_urls: str = field(default="", repr=False)
    """URLs that get signed messages on events, comma-separated, at most 8: https, or http on loopback; empty means
    none.
    """
    webhook_secret_file: Path | None = None
    """File with the secret that signs these messages, readable by its owner only: `whsec_` and 24 to 64 bytes in
    base64. Up to 4 lines are up to 4 secrets, each of which signs.
    """
    webhook_events: str = ",".join(WEBHOOK_EVENTS)
    """Types of these messages, comma-separated."""
    webhook_ca_file: Path | None = None
    """PEM certificates of the authorities to trust for webhooks; default: those of the system."""
    webhook_timeout_s: float = 10.0
    """Seconds for one attempt to deliver a message, 0.1 to 60."""
    webhook_max_attempts: int = 100
    """Failed attempts after which a message is dropped, 1 to 10000."""
    webhook_max_age_s: float = 86_400.0
    """Age of an event in seconds from which a failed attempt is the last one, 1 to 2592000."""
    traces_endpoint: str = ""
    """OTLP/HTTP endpoint for trace spans, such as http://localhost:4318/v1/traces; empty means none."""

    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    log_format: str = "text"
    """text or json."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **flags: Any) -> "ServerConfig":
        """Read the `QFLARE_*` variables; a flag that is not None overrides its variable.

        Raises:
            ConfigError: Lists every unknown name and every invalid value.
        """
        problems: list[str] = []
        values = _read_environment(cls, environ, problems)
        values.update({name: value for name, value in flags.items() if value is not None})
        if problems:
            raise ConfigError("\n".join(problems))
        config = cls(**values)
        return config.checked()

    def checked(self) -> "ServerConfig":
        """Return this configuration with its database URL filled in.

        Raises:
            ConfigError: Lists every value out of range and every contradiction.
        """
        config = self
        if not config.database_url:
            path = (config.data_dir / "qflare.db").absolute()
            if "?" in str(path):
                raise ConfigError(
                    f"data_dir: {path.parent} contains a question mark, which begins the arguments of a database URL: "
                    "choose a folder without, or set database_url"
                )
            config = dataclasses.replace(config, database_url=f"sqlite:///{path}")
        problems = [*_out_of_range(config), *_contradictions(config)]
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    def as_log(self) -> str:
        """Return all settings except secrets as one log line."""
        shown = [item for item in fields(self) if item.repr]
        return " ".join(f"{item.name}={getattr(self, item.name)}" for item in shown)

    @property
    def payload_folder(self) -> Path:
        """Folder of the payload store `files`."""
        return self.payload_dir or self.data_dir / "payloads"

    @property
    def accepted_algorithms(self) -> tuple[str, ...]:
        """Accepted signature algorithms of devices."""
        return _listed(self.device_algorithms)

    @property
    def dashboard_address(self) -> tuple[str, int]:
        """Host and port of the dashboard.

        Raises:
            ValueError: `dashboard` is not host:port.
        """
        return _host_and_port(self.dashboard)

    @property
    def oidc_clients(self) -> tuple[str, ...]:
        """Clients at the identity provider: of the dashboard and of the command line."""
        clients = (self.oidc_client_id, self.oidc_command_line_client_id)
        return tuple(client for client in clients if client)

    @property
    def oidc_audiences(self) -> tuple[str, ...]:
        """Accepted audiences of the identity provider's tokens."""
        return _listed(self.oidc_audience) or self.oidc_clients

    @property
    def oidc_accepted_algorithms(self) -> tuple[str, ...]:
        """Accepted signature algorithms of the identity provider."""
        return _listed(self.oidc_algorithms)

    @property
    def oidc_role_pairs(self) -> tuple[tuple[str, str], ...]:
        """Values of the roles claim, each with the name of its role."""
        pairs = (entry.rpartition("=") for entry in _listed(self.oidc_roles))
        return tuple((value.strip(), role.strip()) for value, _, role in pairs)

    @property
    def webhook_receivers(self) -> tuple[str, ...]:
        """URLs of the receivers of webhooks."""
        return _listed(self.webhook_urls)

    @property
    def webhook_event_types(self) -> tuple[str, ...]:
        """Types of messages that these get."""
        return _listed(self.webhook_events)

    @property
    def metrics_address(self) -> tuple[str, int]:
        """Host and port of the metrics server of the first worker.

        Raises:
            ValueError: `metrics_listen` is not host:port.
        """
        return _host_and_port(self.metrics_listen)

    @property
    def metrics_has_tls(self) -> bool:
        """Whether metrics are served over HTTPS: on every address but loopback, unless `metrics_insecure` is set."""
        return not (self.metrics_insecure or _is_loopback_host(self.metrics_address[0]))

    @property
    def dashboard_has_tls(self) -> bool:
        """Whether the dashboard serves HTTPS itself, with the certificate of the gRPC server."""
        return self.tls_certificate_file is not None and not self.dashboard_behind_proxy

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the listening address."""
        if self.listen.startswith(UNIX_SOCKETS):
            return True
        return _is_loopback_host(_host_of(self.listen))


def _read_environment(
    cls: type[ServerConfig], environ: Mapping[str, str], problems: list[str]
) -> dict[str, Any]:
    types = get_type_hints(cls)
    known = {ENVIRONMENT_PREFIX + item.name.upper(): item.name for item in fields(cls)}
    values: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in CLIENT_NAMES:
            continue
        if name.startswith("QFLARE_TEST_") or name in NOT_SETTINGS:
            continue
        if name not in known:
            if not _is_service_link(name, text):
                problems.append(f"{name}: no such setting")
            continue
        try:
            values[known[name]] = _convert(text, types[known[name]])
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return values


def _is_service_link(name: str, text: str) -> bool:
    """Return whether a variable is a Kubernetes or Docker service link to a service whose name begins with `qflare`."""
    if SERVICE_LINK.fullmatch(name):
        return True
    return name.endswith("_PORT") and SERVICE_URL.fullmatch(text) is not None


def _convert(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in TRUE | FALSE:
            raise ValueError(f"got {text!r}, want true or false")
        return text.lower() in TRUE
    if kind is int:
        if not re.fullmatch(r"-?\d+", text):
            raise ValueError(f"got {text!r}, want a whole number")
        return int(text)
    if kind is float:
        return float(text)
    if kind is str:
        return text
    return Path(text)


def _out_of_range(config: ServerConfig) -> list[str]:
    ranges: dict[str, tuple[float, float]] = {
        "database_pool_size": (1, 1000),
        "database_timeout_s": (0.1, 600),
        "object_store_timeout_s": (0.1, 100),
        "workers": (1, 64),
        "rpc_threads": (4, 512),
        "anonymous_threads": (1, 128),
        "admin_threads": (1, 128),
        "max_uploads": (1, 512),
        "max_downloads": (1, 512),
        "first_message_timeout_s": (0.1, 600),
        "max_waiting_calls": (10, 10**6),
        "max_waiting_calls_per_caller": (1, 10**6),
        "max_connections": (1, 10**6),
        "max_streams_per_connection": (1, 10_000),
        "idle_connection_s": (1, 86_400),
        "connection_age_s": (1, 31_536_000),
        "max_watchers": (1, 64),
        "watch_poll_s": (0.01, 60),
        "dashboard_login_s": (1, 604_800),
        "max_message_bytes": (2**20 + 4096, 2**30),
        "max_payload_bytes": (1, 2**40),
        "max_tensors": (1, 10**6),
        "inline_payload_bytes": (0, 2**20),
        "upload_batch_bytes": (2**20, 2**28),
        "helper_timeout_s": (0.1, 86_400),
        "webhook_timeout_s": (0.1, 60),
        "webhook_max_attempts": (1, 10_000),
        "webhook_max_age_s": (1, 2_592_000),
    }
    problems = []
    for item in fields(config):
        value = getattr(config, item.name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        least, most = ranges.get(item.name, (0, float("inf")))
        if not least <= value <= most:
            problems.append(f"QFLARE_{item.name.upper()}: got {value}, want {least} to {most}")
    return problems


def _contradictions(config: ServerConfig) -> list[str]:
    problems = []
    if (config.tls_certificate_file is None) != (config.tls_key_file is None):
        problems.append("QFLARE_TLS_CERTIFICATE_FILE and QFLARE_TLS_KEY_FILE go together")
    if (config.pkcs11_module is None) != (config.pkcs11_pin_file is None):
        problems.append("QFLARE_PKCS11_MODULE and QFLARE_PKCS11_PIN_FILE go together")
    if config.tls_client_ca_file is not None and config.tls_certificate_file is None:
        problems.append("QFLARE_TLS_CLIENT_CA_FILE needs a server certificate")
    if config.require_pq_tls and config.tls_certificate_file is None:
        problems.append("QFLARE_REQUIRE_PQ_TLS needs a server certificate")
    if not (config.is_loopback or config.allow_insecure or config.tls_certificate_file):
        problems.append(
            f"QFLARE_LISTEN: {config.listen} can be reached from outside; set a server certificate"
        )
    problems += _malformed_addresses(config)
    if config.workers > 1 and config.listen.startswith(UNIX_SOCKETS):
        problems.append("QFLARE_WORKERS: several workers cannot share a Unix socket, want 1")
    problems += _unknown_algorithms(config)
    problems += _contradictions_of_store(config)
    problems.extend(_contradictions_of_dashboard(config))
    problems.extend(_contradictions_of_metrics(config))
    problems.extend(_contradictions_of_oidc(config))
    problems.extend(_contradictions_of_webhooks(config))
    if config.log_level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        problems.append(f"QFLARE_LOG_LEVEL: got {config.log_level}")
    if config.log_format not in {"text", "json"}:
        problems.append(f"QFLARE_LOG_FORMAT: got {config.log_format}, want text or json")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,62}", config.realm):
        problems.append(f"QFLARE_REALM: got {config.realm!r}, want 1 to 63 of a-z 0-9 . -")
    return problems


def _malformed_addresses(config: ServerConfig) -> list[str]:
    problems = []
    for name in ("listen", "health_listen", "metrics_listen"):
        address: str = getattr(config, name)
        optional = name != "listen"
        if optional and not address:
            continue
        if name != "metrics_listen" and address.startswith(UNIX_SOCKETS):
            if address.endswith(":"):
                problems.append(f"QFLARE_{name.upper()}: got {address!r}, want a path after it")
            continue
        try:
            _host_and_port(address)
        except ValueError as error:
            problems.append(f"QFLARE_{name.upper()}: {error}")
    return problems


def _unknown_algorithms(config: ServerConfig) -> list[str]:
    chosen = {
        "ROOT_ALGORITHM": (filter(None, [config.root_algorithm]), ROOT_ALGORITHMS),
        "ONLINE_ALGORITHM": (filter(None, [config.online_algorithm]), ONLINE_ALGORITHMS),
        "DEVICE_ALGORITHMS": (config.accepted_algorithms, ONLINE_ALGORITHMS),
    }
    problems = [
        f"QFLARE_{name}: got {got!r}, want {', '.join(offered)}"
        for name, (named, offered) in chosen.items()
        for got in named
        if got not in offered
    ]
    if not config.accepted_algorithms:
        problems.append("QFLARE_DEVICE_ALGORITHMS: want one or more")
    return problems


def _contradictions_of_store(config: ServerConfig) -> list[str]:
    problems = []
    if config.payload_store not in {"", "files", "database", "object"}:
        got = config.payload_store
        problems.append(f"QFLARE_PAYLOAD_STORE: got {got!r}, want files, database or object")
    if config.payload_store == "object" and not config.object_store_url:
        problems.append("QFLARE_PAYLOAD_STORE=object needs QFLARE_OBJECT_STORE_URL")
    problems += _malformed_bucket(config.object_store_url)
    if config.object_store_endpoint and not _is_safe_url(config.object_store_endpoint):
        problems.append(
            "QFLARE_OBJECT_STORE_ENDPOINT: want an https URL, or http on loopback, without user, query and fragment"
        )
    return problems


def _malformed_bucket(text: str) -> list[str]:
    """Return what is wrong with the URL of a bucket; it is not repeated, as it may contain a secret by mistake."""
    wanted = "want s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
    if not text or re.fullmatch(
        r"(s3|gs|az)://[a-z0-9][a-z0-9._-]{2,221}(/[\w.=-]+)*/?", text, re.ASCII
    ):
        return []
    return [f"QFLARE_OBJECT_STORE_URL: {wanted}"]


def _is_safe_url(text: str) -> bool:
    """Return whether a URL of a service protects what is sent to it, and contains no credentials."""
    url = urlsplit(text)
    if not url.hostname or url.username is not None or url.query or url.fragment:
        return False
    return url.scheme == "https" or (url.scheme == "http" and _is_loopback_host(url.hostname))


def _contradictions_of_dashboard(config: ServerConfig) -> list[str]:
    if not config.dashboard:
        return []
    try:
        host, _ = config.dashboard_address
    except ValueError as error:
        return [f"QFLARE_DASHBOARD: {error}"]
    if config.dashboard_behind_proxy or _is_loopback_host(host):
        return []
    if config.tls_certificate_file is None:
        problem = (
            f"QFLARE_DASHBOARD: {config.dashboard} can be reached from outside; set a server certificate,"
            " or QFLARE_DASHBOARD_BEHIND_PROXY if a proxy ends TLS"
        )
        return [problem]
    if config.require_pq_tls:
        problem = (
            "QFLARE_DASHBOARD cannot require X25519MLKEM768 as QFLARE_REQUIRE_PQ_TLS wants: serve it on a loopback"
            " address, or behind a proxy that does"
        )
        return [problem]
    return []


def _contradictions_of_metrics(config: ServerConfig) -> list[str]:
    try:
        has_tls = bool(config.metrics_listen) and config.metrics_has_tls
    except ValueError:  # reported by _malformed_addresses
        return []
    if has_tls and config.tls_certificate_file is None:
        problem = (
            f"QFLARE_METRICS_LISTEN: {config.metrics_listen} can be reached from outside; set a server certificate,"
            " or QFLARE_METRICS_INSECURE on a network that only Prometheus can reach"
        )
        return [problem]
    if has_tls and config.require_pq_tls:
        problem = (
            "QFLARE_METRICS_LISTEN cannot require X25519MLKEM768 as QFLARE_REQUIRE_PQ_TLS wants: serve the metrics on"
            " a loopback address, or set QFLARE_METRICS_INSECURE on a network that only Prometheus can reach"
        )
        return [problem]
    return []


def _contradictions_of_oidc(config: ServerConfig) -> list[str]:
    if not config.oidc_issuer:
        return ["QFLARE_OIDC_CLIENT_ID needs QFLARE_OIDC_ISSUER"] if config.oidc_client_id else []
    url = urlsplit(config.oidc_issuer)
    problems = []
    if url.scheme != "https" and not (
        url.scheme == "http" and _is_loopback_host(url.hostname or "")
    ):
        problems.append("QFLARE_OIDC_ISSUER: want an https URL, or http on loopback")
    if url.username is not None or url.query or url.fragment:
        problems.append("QFLARE_OIDC_ISSUER: want no user, query or fragment")
    if not config.oidc_client_id:
        problems.append("QFLARE_OIDC_ISSUER needs QFLARE_OIDC_CLIENT_ID")
    named = config.oidc_accepted_algorithms
    if not named or not set(named) <= set(OIDC_ALGORITHMS):
        got = config.oidc_algorithms or "none"
        problems.append(f"QFLARE_OIDC_ALGORITHMS: got {got}, want of {', '.join(OIDC_ALGORITHMS)}")
    pairs = config.oidc_role_pairs
    if not pairs or not all(value and role in OIDC_ROLES for value, role in pairs):
        problems.append(
            f"QFLARE_OIDC_ROLES: want VALUE=ROLE,..., with roles of {', '.join(OIDC_ROLES)}"
        )
    return problems


def _contradictions_of_webhooks(config: ServerConfig) -> list[str]:
    """Return what is wrong with the webhooks; a URL is not repeated, as it may contain a secret."""
    problems = []
    urls, kinds = config.webhook_receivers, config.webhook_event_types
    if not kinds or not set(kinds) <= set(WEBHOOK_EVENTS):
        problems.append(
            f"QFLARE_WEBHOOK_EVENTS: got {config.webhook_events or 'none'}, want of {', '.join(WEBHOOK_EVENTS)}"
        )
    if not all(map(_is_receiver, urls)):
        problems.append(
            "QFLARE_WEBHOOK_URLS: want https URLs, or http on loopback, without user and fragment"
        )
    if len(urls) > MAX_WEBHOOKS or len(set(urls)) < len(urls):
        problems.append(f"QFLARE_WEBHOOK_URLS: want at most {MAX_WEBHOOKS} different URLs")
    if urls and config.webhook_secret_file is None:
        problems.append("QFLARE_WEBHOOK_URLS needs QFLARE_WEBHOOK_SECRET_FILE")
    return problems


def _is_receiver(text: str) -> bool:
    """Return whether a URL may get webhooks."""
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    if not text.isascii() or not text.isprintable() or " " in text:
        return False
    return _is_safe_url(parts._replace(query="").geturl())


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) > MAX_PORT:
        raise ValueError(f"got {address!r}, want host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _host_of(address: str) -> str:
    """Return the host of host:port; an IPv6 address with a port is in brackets."""
    bracketed = re.fullmatch(r"\[([^]]*)\](?::\d+)?", address)
    if bracketed is not None:
        return bracketed[1]
    return address.partition(":")[0] if address.count(":") == 1 else address


def _is_loopback_host(host: str) -> bool:
    """Return whether a host is localhost or a loopback address; other names are not resolved."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
