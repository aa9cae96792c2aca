"""What the dashboard says and draws, without a server: figures, charts, health."""

import math
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qflare_server.serving.dashboard import formatting
from qflare_server.serving.dashboard.alerts import find_alerts, find_audit_alerts, worst
from qflare_server.serving.dashboard.cache import CachedValue
from qflare_server.serving.dashboard.charts import (
    Limit,
    Part,
    Series,
    bar_chart,
    line_chart,
    small_lines,
    steps,
)
from qflare_server.storage.repository.views import Backlog, StorageUsage
from qflare_server.use_cases.status import DatabaseHealth, Report

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
FINITE = st.floats(-1e9, 1e9)
WELL = Report(
    at=NOW,
    replicas=[],
    database=DatabaseHealth("sqlite", "0001", 0.001, 24, 1),
    queues=Backlog(1, 0, 3, 0, 0, None),
    stored=StorageUsage(1000, 1000, 2, 0),
    payload_store_bytes=1000,
    free_bytes=10 * 2**30,
    device_counts={"active": 3},
    session_counts={"running": 1},
    upload_retention_s=3600.0,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "\N{EN DASH}"),
        (0.00042, "0.4 ms"),
        (0.0421, "42 ms"),
        (1.25, "1.2 s"),
        (59.9, "59.9 s"),
        (61, "1 min 01 s"),
        (3661, "1 h 01 min"),
    ],
)
def test_how_long_something_took(seconds: float | None, text: str) -> None:
    assert formatting.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_how_many_bytes(count: int, text: str) -> None:
    assert formatting.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.916, "91.6 %"), (1.0, "100.0 %"), (17.25, "17.25"), (math.nan, "\N{EN DASH}")],
)
def test_a_fraction_is_a_percentage_and_another_measure_is_not(value: float, text: str) -> None:
    assert formatting.share(value) == text


def test_a_time_is_in_utc_with_its_distance() -> None:
    past = formatting.moment(NOW - timedelta(minutes=3), NOW)
    ahead = formatting.moment(NOW + timedelta(seconds=40), NOW)

    assert past is not None
    assert ahead is not None
    assert (past.text, past.distance) == ("2030-01-01 11:57:00", "3 min ago")
    assert ahead.distance == "in 40 s"


@given(st.lists(FINITE, min_size=2, max_size=2), st.integers(1, 10))
@example([0.0, 5e-324], 1)
@example([0.0, 5e-324], 2)
@example([1e-310, 2e-310], 5)
@example([1e-290, 2e-290], 5)
@example([1.0, 1.0 + 2**-52], 5)
def test_the_marks_of_an_axis_cover_its_values(bounds: list[float], count: int) -> None:
    low, high = sorted(bounds)

    marks = steps(low, high, count)

    slack = max(abs(low), abs(high), 1) * 1e-6
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 2 <= len(marks) <= 2 * count + 3


@given(st.lists(st.floats(), min_size=1, max_size=40))
def test_everything_drawn_is_inside_the_drawing(values: list[float]) -> None:
    bounded = [value for value in values if abs(value) < 1e12 or not math.isfinite(value)]
    points = [(float(x), y) for x, y in enumerate(bounded)]

    chart = line_chart(
        "loss",
        "Loss",
        [Series("Loss", "measured", points)],
        x_label="Version",
        y_label="Loss",
        written=formatting.measure,
    )

    assert (chart is None) == (not any(map(math.isfinite, bounded)))
    for plot in chart.plots if chart else ():
        for mark in plot.lines[0].marks:
            assert plot.left - 0.1 <= mark.x <= plot.right + 0.1
            assert plot.top - 0.1 <= mark.y <= plot.bottom + 0.1


def test_a_chart_says_itself_in_words_and_as_a_table() -> None:
    chart = line_chart(
        "accuracy",
        "Accuracy",
        [
            Series("Measured", "measured", [(1, 0.5), (2, 0.9), (3, 0.8)]),
            Series("Trained", "trained", [(2, 0.7)]),
            Series("Nothing", "trained", [(2, math.inf)]),
        ],
        x_label="Version",
        y_label="Accuracy",
        written=formatting.share,
    )

    assert chart is not None
    assert chart.summary == (
        "Measured: from 50.0 % at version 1 to 80.0 % at version 3; lowest 50.0 %, highest 90.0 %."
        " Trained: 70.0 % at version 2."
    )
    assert chart.columns == ["Version", "Measured", "Trained"]
    assert chart.rows[1] == ["2", "90.0 %", "70.0 %"]
    assert chart.rows[2] == ["3", "80.0 %", formatting.NONE]


def test_marks_of_counts_are_whole() -> None:
    bars = bar_chart(
        "b", "B", "", [(1, [Part("A", "a", 1.0)])], x_label="x", y_label="y", written=str
    )
    line = line_chart(
        "l", "L", [Series("A", "a", [(1, 2), (2, 3)])], x_label="x", y_label="y", written=str
    )

    for chart in (bars, line):
        assert chart is not None
        for plot in chart.plots:
            assert all("." not in tick.label for tick in [*plot.x_ticks, *plot.y_ticks])


@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=8))
def test_short_times_are_seen_beside_long_ones(values: list[float]) -> None:
    lines = [Series("A", "a", list(enumerate(values))), Series("B", "b", [(0, 0.02)])]

    chart = line_chart(
        "t", "T", lines, x_label="x", y_label="", written=formatting.duration, is_time=True
    )

    assert chart is not None
    for plot in chart.plots:
        assert len(plot.y_ticks) >= 2
        marks = [mark for line in plot.lines for mark in line.marks]
        assert all(plot.top <= mark.y <= plot.bottom for mark in marks)
    if max(values) > 0.5:
        longest = min(mark.y for mark in chart.plots[0].lines[0].marks)
        assert chart.plots[0].lines[1].marks[0].y - longest > 15


def test_the_release_gate_is_a_line_inside_the_drawing() -> None:
    chart = line_chart(
        "g",
        "G",
        [Series("A", "a", [(1, 0.2), (2, 0.4)])],
        x_label="x",
        y_label="y",
        written=formatting.share,
        limits=[Limit("release gate: at least 90.0 %", 0.9)],
    )

    assert chart is not None
    assert chart.limits == ["release gate: at least 90.0 %"]
    assert "Release gate: at least 90.0 %." in chart.summary
    for plot in chart.plots:
        (limit,) = plot.limits
        assert plot.top <= limit < min(mark.y for mark in plot.lines[0].marks)


def test_small_lines_share_one_scale() -> None:
    low, high = small_lines(
        [Series("low", "a", [(1, 0.1), (2, 0.2)]), Series("high", "a", [(1, 0.8), (2, 0.9)])],
        Series("all", "a", [(1, 0.5), (2, 0.6)]),
        formatting.share,
    )

    assert (low.name, low.last, high.last) == ("low", "20.0 %", "90.0 %")
    assert high.end[1] < low.end[1]
    assert low.behind == high.behind != ""


def test_the_parts_of_a_bar_stand_on_each_other() -> None:
    chart = bar_chart(
        "phases",
        "Phases",
        "In words.",
        [(7, [Part("First", "collecting", 3.0), Part("Second", "publishing", 1.0)])],
        x_label="Round",
        y_label="Seconds",
        written=formatting.duration,
    )

    assert chart is not None
    low, high = chart.plots[0].bars
    assert low.y + low.height == pytest.approx(chart.plots[0].bottom)
    assert high.y + high.height == pytest.approx(low.y)
    assert high.y == pytest.approx(chart.plots[0].top)
    assert chart.rows == [["7", "3.0 s", "1.0 s"]]


def test_a_coordinator_that_is_well_has_no_findings() -> None:
    assert find_alerts(WELL, draining=False) == []
    assert worst([]) == "good"


@pytest.mark.parametrize(
    ("report", "level", "word"),
    [
        (replace(WELL, database=replace(WELL.database, latency_s=1.0)), "warn", "1.0 s to answer"),
        (
            replace(WELL, database=replace(WELL.database, pool_in_use_count=24)),
            "warn",
            "connection",
        ),
        (replace(WELL, free_bytes=2**20), "bad", "1.0 MiB"),
        (replace(WELL, device_counts={"quarantined": 2}), "warn", "2 devices are in quarantine"),
        (
            replace(WELL, queues=replace(WELL.queues, oldest_closed_at=NOW - timedelta(minutes=5))),
            "bad",
            "5 min",
        ),
        (
            replace(WELL, queues=replace(WELL.queues, unsequenced_audit_count=20_000)),
            "warn",
            "20,000",
        ),
    ],
)
def test_what_needs_attention_is_found(report: Report, level: str, word: str) -> None:
    (finding,) = find_alerts(report, draining=False)

    assert finding.level == level
    assert word in finding.text
    assert worst([finding]) == level


def test_the_worst_comes_first() -> None:
    report = replace(WELL, device_counts={"quarantined": 1})

    assert [item.level for item in find_alerts(report, draining=True)] == ["bad", "warn"]


def test_events_of_high_risk_are_a_note_and_critical_ones_a_finding() -> None:
    found = find_audit_alerts({"high": 2, "critical": 1, "low": 100})

    assert [(item.level, item.link) for item in found] == [
        ("bad", "/audit?risk=critical"),
        ("note", "/audit?risk=high"),
    ]
    assert worst(found[1:]) == "good"


def test_a_count_is_kept_for_two_seconds_or_twenty_times_its_cost() -> None:
    at, cost_s, readings = 0.0, 0.01, 0

    def read() -> int:
        nonlocal at, readings
        at += cost_s
        readings += 1
        return readings

    kept = CachedValue(read, lambda: at)

    assert [kept.get(), kept.get()] == [1, 1]
    at += 2.1
    cost_s = 1.0
    assert [kept.get(), kept.get()] == [2, 2]
    at += 19.0
    assert kept.get() == 2
    at += 1.1
    assert kept.get() == 3


STYLES = (files("qflare_server.serving.dashboard") / "static" / "dashboard.css").read_text()
LIGHT, DARK = (
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for block in re.findall(r":root \{(.*?)\}", STYLES, re.DOTALL)
)
TEXTS = [
    *((text, under) for text in ("text", "soft", "link") for under in ("ground", "surface")),
    *((tone, f"{tone}-fill") for tone in ("good", "warn", "bad", "calm")),
    ("bad", "surface"),
    ("surface", "link"),
    ("surface", "bad"),
    ("text", "calm-fill"),
]
MARKS = [(mark, "surface") for mark in ("one", "two", "good", "warn", "bad", "calm", "focus")]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colors as WCAG 2.2 defines it, 1 to 21."""

    def luminance(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("over", "under"), TEXTS)
def test_text_can_be_read_on_its_ground(colors: dict[str, str], over: str, under: str) -> None:
    assert contrast(colors[over], colors[under]) >= 4.5


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("over", "under"), MARKS)
def test_marks_and_lines_can_be_seen(colors: dict[str, str], over: str, under: str) -> None:
    assert contrast(colors[over], colors[under]) >= 3
