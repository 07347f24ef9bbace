"""Charts of runs: lines through the logged values, and a page that refers to nothing outside."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.training.run_charts import MAX_POINTS, Chart, Line, charts, svg, ticks
from janus_modular.training.run_record import Run, open_run

from .conftest import RUN_PROMPTS, logged


class Page(HTMLParser):
    """The content of a page: attributes that can refer to other files, images, lines and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.lines: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "background")
        self.references += [values[name] for name in names if name in values]
        self.lines += [values["points"]] if tag == "polyline" else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_no_other_file_and_has_all_drawings_and_answers(trained: Path, tmp_path: Path):
    run, output = trained / "first", tmp_path / "out.html"
    assert (
        CliRunner()
        .invoke(app, ["runs", "plot", str(run), str(trained / "deep/second"), "-o", str(output)])
        .exit_code
        == 0
    )
    text = output.read_text("utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "b"} & {*page.tags}
    assert not re.search(r"url\(|@import|https?:", text)
    files = [
        run / f"validation/step-{step:07}/drawing-{number}.png" for number in range(2) for step in (2, 4, 6)
    ]
    prefix = "data:image/png;base64,"
    assert all(reference.startswith(prefix) for reference in page.references)
    images = [base64.b64decode(reference.removeprefix(prefix)) for reference in page.references]
    assert images == [file.read_bytes() for file in files]
    assert RUN_PROMPTS[1] in page.text
    assert page.text.count("Why?") == 2
    for step in (2, 4, 6):
        for answer in json.loads((run / f"validation/step-{step:07}/answers.json").read_text("utf-8")):
            assert answer["answer"] in "".join(page.text)


def test_lines_go_through_the_values(trained: Path):
    run = open_run(trained / "first")
    made = {chart.title: chart for chart in charts([run])}
    assert [*made] == ["Loss", "Loss by name", "Loss by source", "Validation loss", "Learning rate"]
    values = logged(trained / "first")
    for chart in made.values():
        for line in chart.lines:
            assert line.points == [(s, v[line.label]) for s, v in sorted(values.items()) if line.label in v]
    assert {line.label for line in made["Loss by source"].lines} == {
        f"source/{s}" for s in ("draw", "read", "text")
    }
    [drawn] = Page(svg(Chart("a", [Line("b", [(0, 1.0), (5, 2.0), (10, 4.0)])]))).lines
    (x0, y0), (x1, y1), (x2, y2) = ([float(n) for n in point.split(",")] for point in drawn.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # coordinates have one decimal
    assert 2 * (y0 - y1) == pytest.approx(y1 - y2, abs=0.31)
    assert y2 < y1  # upwards


@pytest.mark.parametrize(
    "points",
    [
        [(3, 0.0)],
        [(3, 5.0), (4, 5.0)],
        [(1, -1e-9), (9, 1e9)],
        [(1, -1e300), (2, 1e300)],
        [(1, 0), (2, 5e-324)],
        [(1, 3.0), (2, 3.0000000000000004)],
    ],
)
def test_any_values_have_a_chart(points: list[tuple[int, float]]):
    [line] = Page(svg(Chart("a", [Line("b", points)]))).lines
    assert len(line.split()) == len(points)


def test_ticks_are_round_numbers_in_the_range():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(4.81, 5.35) == pytest.approx([5.0, 5.2])
    assert ticks(-1.2, 0.7) == pytest.approx([-1.0, -0.5, 0.0, 0.5])
    assert ticks(0, 9_999) == [0, 2_000, 4_000, 6_000, 8_000]


def test_a_long_run_is_thinned_out_and_the_label_says_so(tmp_path: Path):
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 2 * MAX_POINTS + 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    [chart] = charts([Run(tmp_path)])
    [line] = chart.lines
    assert line.label == "loss (1 of 3 values)"
    assert len(line.points) <= MAX_POINTS
    assert line.points[-1] == (2 * MAX_POINTS + 2, 1 / (2 * MAX_POINTS + 2))
    assert len({*line.points}) == len(line.points)


def test_a_png_is_an_image(trained: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert (
        CliRunner()
        .invoke(app, ["runs", "plot", str(trained / "first"), "-o", str(tmp_path / "out.png")])
        .exit_code
        == 0
    )
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
        assert len(set(image.convert("L").tobytes())) > 10
