"""A helper in operation: TLS of calls and metrics, rotation of its keys, and what commands show of its rounds."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from qflare.v1 import helper_service_pb2, training_pb2
from qflare_client import Client, InsufficientTaskError, enroll
from qflare_client.admin.__main__ import main as admin_main
from qflare_helper.__main__ import main as helper_main
from qflare_server.cli.main import main as server_main
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.storage.repository.audit import Caller
from tests.integration.secure_aggregation.conftest import (
    SecureDeployment,
    SecureStart,
    contribute,
    wait_for_round,
    wait_for_version,
)
from tests.support.helpers import HelperProcess

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

REFUSED = (urllib.error.URLError, ConnectionError, ssl.SSLError)
"""What a client gets whose handshake fails, at one of several moments."""


def _with_authorities(helper: HelperProcess, authorities: str) -> None:
    """Let the coordinator connect to the helper over TLS."""
    bundle = helper_service_pb2.HelperBundle()
    json_format.Parse(helper.bundle_file.read_text(), bundle)
    bundle.certificate_authorities = authorities
    helper.bundle_file.write_text(json_format.MessageToJson(bundle))


def test_a_helper_answers_and_is_scraped_over_tls(secure: SecureStart, tmp_path: Path) -> None:
    folder, made = tmp_path / "certificates", secure()
    assert server_main(["certificates", "make", "--output", str(folder), "--client", "probe"]) == 0
    helper, authority = made.helpers[0], folder / "ca.pem"
    helper.stop()
    files = (
        "--tls-certificate",
        str(folder / "server.pem"),
        "--tls-key",
        str(folder / "server.key"),
    )
    helper.start(*files, "--metrics-listen", "127.0.0.1:0", "--metrics-tls")
    _with_authorities(helper, authority.read_text())
    session_id = made.session(quorum=2)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_version(clients[0], session_id, 1)

    trusted = ssl.create_default_context(cafile=str(authority))
    assert 'outcome="answered"} 1.0' in _scraped(helper.metrics_port, trusted)
    with pytest.raises(REFUSED):
        _scraped(helper.metrics_port, ssl.create_default_context())
    with pytest.raises(REFUSED):
        _scraped(helper.metrics_port, None)

    # With authorities of clients, metrics need a certificate too, as calls do.
    helper.stop()
    mutual = (*files, "--tls-client-ca", str(authority))
    helper.start(*mutual, "--metrics-listen", "127.0.0.1:0", "--metrics-tls")
    with pytest.raises(REFUSED):
        _scraped(helper.metrics_port, trusted)
    trusted.load_cert_chain(folder / "probe.pem", folder / "probe.key")
    assert "qflare_helper_counter 1.0" in _scraped(helper.metrics_port, trusted)


def _scraped(port: int, context: ssl.SSLContext | None) -> str:
    scheme = "http" if context is None else "https"
    url = f"{scheme}://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=10, context=context) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--metrics-listen", "192.0.2.1:9465"), "need a certificate and a key"),
        (("--metrics-listen", "127.0.0.1:0", "--metrics-tls"), "need a certificate and a key"),
        (
            ("--tls-certificate", "absent.pem", "--tls-key", "absent.key"),
            "cannot read absent.pem",
        ),
    ],
)
def test_metrics_that_others_reach_are_not_served_without_tls(
    secure: SecureStart, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    helper = secure().helpers[0]
    helper.stop()
    assert helper_main(["--home", str(helper.home), "serve", *options]) == 1
    assert told in capsys.readouterr().err


def _rotate(helper: HelperProcess) -> None:
    """Rotate the helper's KEM key, and give the coordinator the new bundle."""
    helper.stop()
    new = helper.home.parent / "rotated.json"
    assert helper_main(["--home", str(helper.home), "rotate", "--output", str(new)]) == 0
    new.replace(helper.bundle_file)
    helper.start()


def _kem_key(client: Client, session_id: str) -> str:
    masking = client.get_task(session_id).masking
    assert masking is not None
    return masking.helpers[0].kem_key.key_id


def test_open_rounds_go_on_with_the_old_key_and_new_ones_use_the_rotated_one(
    secure: SecureStart,
) -> None:
    made = secure()
    helper, session_id = made.helpers[0], made.session(quorum=2, round_count=2)
    helper_id = helper.helper_id
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    old = _kem_key(clients[0], session_id)
    contribute(clients[0], session_id, 0)
    _rotate(helper)
    assert helper.helper_id == helper_id
    # The signed task of the open round names the old key, for devices that come after the rotation, too.
    assert _kem_key(clients[1], session_id) == old
    contribute(clients[1], session_id, 1)
    wait_for_version(clients[0], session_id, 1)
    wait_for_round(clients[0], session_id, 2)
    new = _kem_key(clients[0], session_id)
    assert new != old
    assert _kem_key(clients[0], made.session(quorum=2)) == new
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_version(clients[0], session_id, 2)
    # The ledger holds answers of before and after the rotation, and verifies as a whole.
    assert helper_main(["--home", str(helper.home), "audit", "verify"]) == 0


def test_a_second_helper_takes_over_new_sessions_and_bundles_name_both(
    secure: SecureStart, tmp_path: Path
) -> None:
    made = secure()
    deployment, parts = made.deployment, made.deployment.coordinator.parts
    first = made.helpers[0]
    assert parts.helper_key_ids == [first.helper_id]
    early = _enrolled(made, tmp_path / "early")
    old_session = made.session(quorum=2)
    pinned = bootstrap_bundle(parts.keys.trust, "localhost:1")
    second = HelperProcess(tmp_path / "second", pinned, first.bundle_file.parent, 2)
    second.start()
    try:
        assert parts.helper_key_ids == sorted([first.helper_id, second.helper_id])
        late = _enrolled(made, tmp_path / "late")
        new_session = made.session(quorum=2, policy={"helpers": [second.helper_id]})
        with early, late:
            with pytest.raises(InsufficientTaskError, match="bootstrap bundle names"):
                early.get_task(new_session)
            for index, client in enumerate((early, late)):
                contribute(client, old_session, index)
            wait_for_version(late, old_session, 1)
            contribute(late, new_session, 0)
            contribute(deployment.device("another"), new_session, 1)
            wait_for_version(late, new_session, 1)
    finally:
        second.stop()


def _enrolled(made: SecureDeployment, home: Path) -> Client:
    """Enroll a device with a bundle that names the helpers that the coordinator knows; return its client."""
    parts = made.deployment.coordinator.parts
    secret = parts.use_cases.tokens.issue_enrollment(Caller())[0].secret
    bundle = bootstrap_bundle(
        parts.keys.trust,
        made.deployment.coordinator.address,
        enrollment_token=secret,
        helper_key_ids=parts.helper_key_ids,
    )
    enroll(bundle, home=home)
    return Client(home=home)


def test_commands_show_stage_cohort_and_drop_outs(
    secure: SecureStart, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    made = secure()
    deployment = made.deployment
    token = tmp_path / "admin.token"
    token.write_text(deployment.admin_token)
    token.chmod(0o600)
    monkeypatch.setenv("QFLARE_PROFILE", str(tmp_path / "profile"))
    words = ("--address", deployment.coordinator.address, "--token-file", str(token))
    assert admin_main(["profile", "set", *words]) == 0

    def shown(*command: str) -> str:
        capsys.readouterr()
        assert admin_main(["session", *command]) == 0
        return " ".join(capsys.readouterr().out.split())

    clients = [deployment.device(f"device-{index}") for index in range(3)]
    selection = training_pb2.SelectionPolicy(device_count=3)
    session_id = made.session(quorum=2, selection=selection)
    contribute(clients[0], session_id, 0)
    assert "open takes masked updates 1" in shown("rounds", session_id)
    assert "round 1: stage takes masked updates, cohort 1" in shown("show", session_id)
    assert "stage takes masked updates cohort 1" in shown("aggregation", session_id)
    contribute(clients[1], session_id, 1)
    wait_for_version(clients[0], session_id, 1)
    listed = shown("rounds", session_id)
    assert "stage cohort drop-outs" in listed
    assert "published unmasked 2 1" in listed
    assert "round 1: stage unmasked, cohort 2, drop-outs 1" in shown("show", session_id)
    plain = deployment.session()
    assert "stage" not in shown("rounds", plain) + shown("show", plain)
