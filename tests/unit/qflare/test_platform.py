"""Windows is refused with a sentence, by whatever is imported first."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["qflare", "qflare_client", "qflare_client.admin.__main__", "qflare_server.cli.main"]
)
def test_windows_is_refused(module: str) -> None:
    code = f"import sys, importlib; sys.platform = 'win32'; importlib.import_module({module!r})"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: QFLARE does not run on Windows: ")
    assert "WSL 2" in last
