"""Names of the package are imported when they are used, so that a process of the pool starts without a coordinator."""

import subprocess
import sys

import pytest

import qflare_simulation


@pytest.mark.parametrize("name", qflare_simulation.__all__)
def test_every_name_is_found_and_listed(name: str) -> None:
    found = getattr(qflare_simulation, name)

    assert getattr(qflare_simulation, name) is found
    assert name in dir(qflare_simulation)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'simulat'"):
        qflare_simulation.simulat  # noqa: B018


def test_a_process_of_the_pool_imports_no_coordinator() -> None:
    program = "import sys, qflare_simulation.worker; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "qflare_client" in loaded
    assert loaded.isdisjoint({"qflare_server", "sqlalchemy", "alembic", "sklearn"})
