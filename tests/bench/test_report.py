"""A report as JSON, as a page, and as a plot."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fluxdeploy.bench.clock import Ratio, Timing
from fluxdeploy.bench.report.page import render_page, write_page
from fluxdeploy.bench.report.plot import plot_bench
from fluxdeploy.bench.report.record import (
    Agreement,
    BenchReport,
    ContenderReport,
    Workload,
    from_json,
    to_json,
)
from fluxdeploy.bench.report.tables import labels, make_tables, notes, seconds
from fluxdeploy.errors import UsageError


def timing(value: float, ratio: float | None) -> Timing:
    spread = None if ratio is None else Ratio(ratio, 0.9 * ratio, 1.2 * ratio)
    return Timing(6, value, 1.1 * value, 1.2 * value, (value, 1.05 * value), spread)


OURS = ContenderReport(
    name="<bundle> & co",
    title="onnxruntime on cpu",
    precision="int8-dynamic",
    is_bundle=True,
    agreement=Agreement(0.0, None),
    timings={
        "picture": timing(0.5, 4.0),
        "step": timing(0.1, 5.0),
        "transformer": timing(0.098, 5.1),
        "host": timing(0.0002, None),
        "conditioner": timing(0.004, None),
        "cold start": timing(1.25, 6.0),
    },
    load=0.75,
    memory=300 << 20,
    gpu_memory=None,
    energy=None,
)
EAGER = ContenderReport(
    name="eager",
    title="PyTorch eager",
    precision="fp32",
    is_bundle=False,
    agreement=Agreement(2e-3, 41.25),
    timings={
        "picture": timing(2.0, 1.0),
        "step": timing(0.5, 1.0),
        "transformer": timing(0.5, 1.0),
        "cold start": timing(7.5, 1.0),
    },
    load=3.0,
    memory=None,
    gpu_memory=3 << 30,
    energy=12.5,
)
REPORT = BenchReport(
    fluxdeploy="0.1",
    machine={"cpu": "a <fast> one", "cores": 2, "packages": {"numpy": "2.0"}},
    workload=Workload("a cat", 96, 64, 4, 2, 20, 3.5, 1, "cpu"),
    baseline="eager",
    rounds=2,
    warmup=1,
    cold_starts=3,
    one_by_one=False,
    noise={"picture": Ratio(1.01, 0.98, 1.03)},
    contenders=(OURS, EAGER),
)


def cells(title: str) -> dict[str, list[str]]:
    (table,) = (table for table in make_tables(REPORT) if table.title.startswith(title))
    return {row[0]: list(row[1:]) for row in table.rows}


def test_json_gives_the_report_back() -> None:
    text = to_json(REPORT)
    assert from_json(text) == REPORT
    rates = [contender["images_per_minute"] for contender in json.loads(text)["contenders"]]
    assert rates == [240.0, 60.0]  # two pictures in each call


@pytest.mark.parametrize("text", ["", "[]", "{}", to_json(REPORT).replace('"p90"', '"p91"')])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no report of `fluxdeploy bench`"):
        from_json(text)


def test_the_tables_hold_the_figures() -> None:
    name = "<bundle> & co (int8-dynamic)"
    pictures = cells("2 pictures of 96x64 in 4 steps")
    assert pictures[name] == ["500 ms", "550 ms", "600 ms", "4.00 (3.60 to 4.80)", "240"]
    assert pictures["eager"] == ["2 s", "2.2 s", "2.4 s", "1", "60"]
    parts = cells("Where the time goes")
    assert parts[name] == ["98 ms", "200 µs", "4 ms"]
    assert parts["eager"] == ["500 ms", "", ""]
    start = cells("Start and memory")
    assert start[name] == ["1.25 s", "6.00 (5.40 to 7.20)", "750 ms", "300 MiB", "", ""]
    assert start["eager"] == ["7.5 s", "1", "3 s", "", "3.0 GiB", "12.5 J"]
    assert cells("Against <bundle>") == {"eager": ["2.0e-03", "41.2 dB"]}
    text = " ".join(notes(REPORT))
    assert "eager comes to 1.01 (0.98 to 1.03)" in text
    assert "without a conditioner" in text


def test_bundles_are_called_by_their_folders_while_that_tells_them_apart() -> None:
    def called(*names: str) -> list[str]:
        bundles = tuple(replace(OURS, name=name) for name in names)
        return list(labels(replace(REPORT, contenders=(*bundles, EAGER))).values())

    assert called("a/fp32", "b/int8") == ["fp32 (int8-dynamic)", "int8 (int8-dynamic)", "eager"]
    assert called("a/x", "b/x") == ["a/x (int8-dynamic)", "b/x (int8-dynamic)", "eager"]


@pytest.mark.parametrize(
    ("value", "words"),
    [(123.4, "123 s"), (1.0, "1 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (0.0, "0 µs")],
)
def test_durations_have_three_digits_and_a_unit(value: float, words: str) -> None:
    assert seconds(value) == words


class _Page(HTMLParser):
    """Which tags a page has, whether they are closed, and every address in it."""

    VOID = ("meta", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else() -> None:
    text = render_page(REPORT)
    page = _Page(text)
    assert page.open == []
    assert page.addresses == []
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert page.seen.count("svg") == 2
    assert page.seen.count("table") == len(make_tables(REPORT))


def test_the_page_shows_names_as_they_are() -> None:
    text = render_page(REPORT)
    assert "&lt;bundle&gt; &amp; co" in text
    assert "<bundle>" not in text
    assert "a &lt;fast&gt; one" in text


def test_a_bundle_alone_has_a_page_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    alone = replace(OURS, timings={n: t for n, t in OURS.timings.items() if n != "cold start"})
    report = replace(REPORT, baseline=alone.name, cold_starts=0, contenders=(alone,))
    write_page(report, tmp_path / "bench.html")
    plot_bench(report, tmp_path / "bench.png")
    assert "cold start" not in (tmp_path / "bench.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.html", "bench.png"]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_bench(REPORT, tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as image:
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 20
