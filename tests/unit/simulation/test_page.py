"""The manual names every column of the history and every setting of a simulation."""

import dataclasses
import re

from docs import make_history
from qflare_simulation import SimulationConfig


def test_the_columns_are_current() -> None:
    text = make_history.PAGE.read_text()

    assert text == make_history.page(text), "run python -m docs.make_history"


def test_every_setting_is_described() -> None:
    text = make_history.PAGE.read_text()
    table = text.partition("## The configuration")[2].partition("The same file starts")[0]
    named = set(re.findall(r"`(\w+)`", table))

    settings = {field.name for field in dataclasses.fields(SimulationConfig)} - {"training"}
    assert settings <= named
