"""Settings are read once, every fault is reported, and nothing secret is shown."""

from dataclasses import fields
from pathlib import Path

import pytest

from qflare.crypto.signing import ONLINE_ALGORITHMS, Algorithm, algorithm_names
from qflare_server.config import ONLINE_ALGORITHMS as ONLINE_NAMES
from qflare_server.config import ROOT_ALGORITHMS, ConfigError, ServerConfig

INSIDE = {"QFLARE_DATA_DIR": "/srv/qflare"}


def read(**environ: str) -> ServerConfig:
    return ServerConfig.from_env(
        INSIDE | {f"QFLARE_{name}": text for name, text in environ.items()}
    )


def test_defaults_serve_this_machine_only() -> None:
    config = ServerConfig.from_env({})

    assert config.is_loopback
    assert config.require_signatures
    assert config.database_url.startswith("sqlite:////")


def test_database_lies_in_the_data_folder() -> None:
    assert read().database_url == "sqlite:////srv/qflare/qflare.db"


def test_environment_is_read() -> None:
    config = read(
        LISTEN="127.0.0.1:0", RPC_THREADS="8", LEASE_S="2.5", REFLECTION="off", REALM="ward.test"
    )

    assert (config.listen, config.rpc_threads, config.lease_s) == ("127.0.0.1:0", 8, 2.5)
    assert config.reflection is False
    assert config.data_dir == Path("/srv/qflare")


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "yes", "on"])
def test_words_for_true(text: str) -> None:
    assert read(ALLOW_INSECURE=text).allow_insecure is True


@pytest.mark.parametrize("text", ["0", "false", "No", "off"])
def test_words_for_false(text: str) -> None:
    assert read(REFLECTION=text).reflection is False


def test_flag_overrides_the_environment() -> None:
    environ = INSIDE | {"QFLARE_LISTEN": "127.0.0.1:1", "QFLARE_REALM": "ward"}

    config = ServerConfig.from_env(environ, listen="127.0.0.1:2", realm=None)

    assert (config.listen, config.realm) == ("127.0.0.1:2", "ward")


def test_unknown_name_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="QFLARE_RPC_THREAD: no such setting"):
        read(RPC_THREAD="8")


def test_names_of_the_device_side_and_of_others_are_left_alone() -> None:
    environ = {"QFLARE_HOME": "/home/x", "QFLARE_TOKEN": "t", "QFLARE_TEST_X": "1", "PATH": "/bin"}

    assert ServerConfig.from_env(environ).realm == "qflare"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ROOT_ALGORITHM", "rsa"),
        ("ONLINE_ALGORITHM", "slh-dsa-sha2-128s"),
        ("DEVICE_ALGORITHMS", "ml-dsa-65,slh-dsa-sha2-128s"),
        ("DEVICE_ALGORITHMS", "ml-dsa-65,,ML-DSA-87"),
        ("DEVICE_ALGORITHMS", " , "),
        ("RPC_THREADS", "many"),
        ("RPC_THREADS", "1.5"),
        ("RPC_THREADS", ""),
        ("RPC_THREADS", "3"),
        ("RPC_THREADS", "513"),
        ("WORKERS", "0"),
        ("LEASE_S", "soon"),
        ("LEASE_S", "-1"),
        ("LEASE_S", "nan"),
        ("REFLECTION", "maybe"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("REALM", "Upper"),
        ("REALM", ""),
        ("MAX_MESSAGE_BYTES", "1000"),
        ("INLINE_PAYLOAD_BYTES", "2000000"),
        ("DATABASE_POOL_SIZE", "0"),
    ],
)
def test_value_that_does_not_fit_is_a_fault_that_names_it(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"QFLARE_{name}"):
        read(**{name: text})


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read(RPC_THREADS="many", LEASE_S="soon", NONSENSE="1")

    assert len(str(caught.value).splitlines()) == 3


def test_all_contradictions_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read(LISTEN="0.0.0.0:50051", REQUIRE_PQ_TLS="1", TLS_KEY_FILE="/k", WORKERS="65")

    assert len(str(caught.value).splitlines()) >= 4


@pytest.mark.parametrize(
    "listen",
    [
        "0.0.0.0:50051",
        "[::]:50051",
        "qflare.example:443",
        "127.example.test:50051",
        "127.0.0.1.example.test:50051",
        "localhost.example.test:50051",
        "[::1].example.test:50051",
        "::1:5005",
        "127.:1",
    ],
)
def test_open_address_needs_a_certificate(listen: str) -> None:
    with pytest.raises(ConfigError, match="QFLARE_LISTEN"):
        read(LISTEN=listen)

    assert read(LISTEN=listen, ALLOW_INSECURE="1").listen == listen
    assert read(LISTEN=listen, TLS_CERTIFICATE_FILE="/c", TLS_KEY_FILE="/k").listen == listen


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:1", "localhost:1", "127.8.0.1:1", "[::1]:1", "unix:/run/q", "unix-abstract:q"],
)
def test_loopback_needs_none(listen: str) -> None:
    assert read(LISTEN=listen).is_loopback


@pytest.mark.parametrize(
    "names",
    [
        {"TLS_CERTIFICATE_FILE": "/c"},
        {"TLS_KEY_FILE": "/k"},
        {"TLS_CLIENT_CA_FILE": "/ca"},
        {"REQUIRE_PQ_TLS": "1"},
    ],
)
def test_half_of_a_tls_setting_is_a_fault(names: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        read(**names)


def test_password_of_the_database_is_never_shown() -> None:
    config = read(DATABASE_URL="postgresql://me:hunter2@host/db")

    assert "hunter2" not in repr(config)
    assert "hunter2" not in config.as_log()


def test_every_setting_can_be_read_from_the_environment_by_its_name() -> None:
    names = {f"QFLARE_{item.name.upper()}" for item in fields(ServerConfig)}

    with pytest.raises(ConfigError) as caught:
        ServerConfig.from_env(dict.fromkeys(names, "\0not a value"))

    assert "no such setting" not in str(caught.value)


def test_the_names_of_algorithms_are_those_of_the_contract() -> None:
    assert set(ROOT_ALGORITHMS) == set(algorithm_names(Algorithm))
    assert set(ONLINE_NAMES) == set(algorithm_names(ONLINE_ALGORITHMS))


def test_every_algorithm_that_signs_often_is_accepted_of_devices_by_default() -> None:
    assert set(read().accepted_algorithms) == set(ONLINE_NAMES)


def test_accepted_algorithms_are_a_list() -> None:
    config = read(DEVICE_ALGORITHMS="ml-dsa-87, ml-dsa-65-ed25519")

    assert config.accepted_algorithms == ("ml-dsa-87", "ml-dsa-65-ed25519")


@pytest.mark.parametrize("address", ["127.0.0.1:8080", "localhost:0", "[::1]:8080", "127.8.0.1:1"])
def test_a_dashboard_for_this_machine_needs_no_tls(address: str) -> None:
    assert ServerConfig(dashboard=address).checked().dashboard == address


@pytest.mark.parametrize(
    "address", ["8080", ":8080", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:-1"]
)
def test_a_dashboard_s_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match=r"QFLARE_DASHBOARD: got .*want host:port"):
        ServerConfig(dashboard=address).checked()


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:80", "example.org:80", "127.evil.example:80"],
)
def test_a_dashboard_for_others_needs_tls_or_a_proxy(address: str) -> None:
    with pytest.raises(ConfigError, match="QFLARE_DASHBOARD_BEHIND_PROXY if a proxy ends TLS"):
        ServerConfig(dashboard=address, allow_insecure=True).checked()

    assert (
        not ServerConfig(dashboard=address, dashboard_behind_proxy=True).checked().dashboard_has_tls
    )


def test_a_dashboard_cannot_promise_a_post_quantum_key_exchange(tmp_path: Path) -> None:
    files = {"tls_certificate_file": tmp_path / "a", "tls_key_file": tmp_path / "b"}

    with pytest.raises(ConfigError, match="QFLARE_DASHBOARD cannot require X25519MLKEM768"):
        ServerConfig(dashboard="0.0.0.0:1", require_pq_tls=True, **files).checked()  # type: ignore[arg-type]


SERVICE_LINKS = {
    "PORT": "tcp://10.96.0.7:50051",
    "SERVICE_HOST": "10.96.0.7",
    "SERVICE_PORT": "50051",
    "SERVICE_PORT_GRPC": "50051",
    "PORT_50051_TCP": "tcp://10.96.0.7:50051",
    "PORT_50051_TCP_PROTO": "tcp",
    "PORT_50051_TCP_PORT": "50051",
    "PORT_50051_TCP_ADDR": "10.96.0.7",
    "DASHBOARD_PORT": "tcp://10.96.0.8:8080",
    "DASHBOARD_SERVICE_HOST": "fd00::8",
    "DASHBOARD_SERVICE_PORT": "8080",
    "DASHBOARD_PORT_8080_TCP": "tcp://[fd00::8]:8080",
    "METRICS_PORT": "udp://10.96.0.9:9464",
}
"""What the kubelet sets in every pod for services named `qflare`, `qflare-dashboard` and `qflare-metrics`."""


def test_variables_of_a_service_link_are_no_settings() -> None:
    assert read(**SERVICE_LINKS) == read()


@pytest.mark.parametrize(
    ("name", "text"), [("PORT", "50051"), ("LISTEN_PORT", "50051"), ("SERVICE", "x"), ("HOST", "x")]
)
def test_a_misspelled_setting_is_no_service_link(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"QFLARE_{name}: no such setting"):
        read(**{name: text})


@pytest.mark.parametrize("name", ["LISTEN", "HEALTH_LISTEN", "METRICS_LISTEN"])
@pytest.mark.parametrize(
    "text", ["localhost", "localhost:", ":50051", "localhost:65536", "localhost:5o", "50051"]
)
def test_an_address_without_host_or_port_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"QFLARE_{name}: got '{text}', want host:port"):
        read(**{name: text})
