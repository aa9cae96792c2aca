"""The administrator guide, with the real grpcurl and with qflare-admin, from an empty folder to exported models."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.manual_pages import ROOT, decode, run_page, steady, transcripts

PAGE = ROOT / "docs/administration.md"

pytestmark = pytest.mark.slow


def test_every_command_of_the_page_runs_and_prints_what_the_page_says(
    grpcurl: str, tmp_path: Path
) -> None:
    text = PAGE.read_text()

    printed = run_page(text, tmp_path, str(Path(grpcurl).parent))

    for number, block in transcripts(text):
        assert steady(decode(printed[number].strip())) == steady(decode(block.code.strip()))
    np.testing.assert_array_equal(np.load(tmp_path / "final.npz")["bias"], np.full(10, 3))
    np.testing.assert_array_equal(
        load_file(tmp_path / "final.safetensors")["bias"], np.full(10, 2, np.float32)
    )
    assert (tmp_path / "curve.svg").stat().st_size > 0
    assert "config.selection.fraction" in (tmp_path / "error.json").read_text()
