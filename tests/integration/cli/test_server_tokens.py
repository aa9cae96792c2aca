"""`qflare-server token issue`: what devices that enroll with its tokens get."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare_client import enroll
from qflare_server.cli.main import main

Deploy = Callable[..., Any]


def issue(deployment: Any, *words: str) -> int:
    """Run the command on the data of a coordinator."""
    config = deployment.config
    place = ["--data-dir", str(config.data_dir), "--database-url", config.database_url]
    return main([*place, "token", "issue", *words])


def test_a_device_is_in_the_groups_of_its_token(deploy: Deploy, tmp_path: Path) -> None:
    deployment, bundles = deploy(), tmp_path / "bundles"
    words = ("--group", "ward-3", "--group", "pilot", "--bundles", str(bundles))

    assert issue(deployment, *words, "--address", deployment.coordinator.address) == 0

    (bundle,) = bundles.iterdir()
    device_id = enroll(bundle, home=tmp_path / "device").device_id
    request = admin_pb2.GetDeviceRequest(device_id=device_id)
    device = deployment.admin.GetDevice(request, metadata=deployment.metadata).device
    assert list(device.groups) == ["pilot", "ward-3"]


@pytest.mark.parametrize("group", ["", "ward 3", "\x1b[31m", "ward\n3", "ward\u202e3", "a" * 200])
def test_a_malformed_group_is_refused_and_shown_harmless(
    deploy: Deploy, capfd: pytest.CaptureFixture[str], group: str
) -> None:
    deployment = deploy()
    capfd.readouterr()

    assert issue(deployment, "--group", group) != 0

    out, err = capfd.readouterr()
    assert out == ""
    assert (out + err).replace("\n", "").isprintable()
