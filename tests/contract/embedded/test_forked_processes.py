"""The in-process functions in processes that were forked or spawned after their parts were opened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FORKS = """\
import json
import multiprocessing
import sys
import time

from qflare_server import aggregator, registry


def use(results):
    started = time.monotonic()
    try:
        registry.register_device("before", {})
        refused = ""
    except registry.ForkedError as error:
        refused = str(error)
    try:
        aggregator.get_aggregation_status()
    except aggregator.ForkedError:
        refused += " both"
    took_s = time.monotonic() - started
    registry.close()
    results.put((refused, took_s, registry.register_device("after", {})))


if __name__ == "__main__":
    assert registry.register_device("parent", {})
    context = multiprocessing.get_context(sys.argv[1])
    results = context.SimpleQueue()
    worker = context.Process(target=use, args=(results,))
    worker.start()
    found = results.get()
    worker.join(30)
    names = sorted(registry.get_registered_devices())
    registry.close()
    print(json.dumps([*found, worker.exitcode, names]))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_forked_process_is_told_at_once(database_url: str, tmp_path: Path, method: str) -> None:
    path = tmp_path / "program.py"
    path.write_text(FORKS)
    variables = {"QFLARE_DATA_DIR": str(tmp_path / "data"), "QFLARE_DATABASE_URL": database_url}

    done = subprocess.run(
        [sys.executable, os.fspath(path), method],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        env=os.environ | variables,
    )

    assert done.returncode == 0, done.stderr
    refused, took_s, registered, exit_code, names = json.loads(done.stdout)
    assert (registered, exit_code) == (True, 0)
    if method == "fork":
        assert "forked" in refused
        assert refused.endswith("both")
        assert took_s < 1.0
        assert names == ["after", "parent"]
    else:
        assert names == ["after", "before", "parent"]
