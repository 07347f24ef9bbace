"""Charts of runs: as an HTML page that needs no other file, and as PNG by matplotlib. Imports no torch."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path

from janus_modular.errors import TrainingError, require_extras
from janus_modular.foreign import foreign_errors
from janus_modular.training.run_record import Run

MAX_POINTS = 1000
"""More values of a line are thinned out evenly; its label says so."""

COLORS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#555",
    "#bcbd22",
    "#17becf",
)

CHARTS: dict[str, Callable[[str], bool]] = {
    "Loss": lambda name: name == "loss",
    "Loss by name": lambda name: name.startswith("loss/"),
    "Loss by source": lambda name: name.startswith("source/"),
    "Validation loss": lambda name: name.startswith("validation/"),
    "Learning rate": lambda name: name == "lr" or name.startswith("lr/"),
}
"""The metrics of each chart."""


@dataclass(frozen=True)
class Line:
    """A metric of a run over its steps."""

    label: str
    points: list[tuple[int, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis of steps."""

    title: str
    lines: list[Line]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts for which there are values.

    Raises:
        TrainingError: there is none, or a file of a run is damaged.
    """
    names = sorted({name for run in runs for values in run.metrics.values() for name in values})
    drawn_charts = [
        Chart(title, lines)
        for title, belongs in CHARTS.items()
        if (
            lines := [
                line for name in filter(belongs, names) for run in runs for line in _lines(run, name, runs)
            ]
        )
    ]
    if not drawn_charts:
        raise TrainingError(
            f"{', '.join(str(run.metrics_file) for run in runs)}: found no losses; expected metrics that"
            " training logged. Train with trackers=[{name: jsonl}], or wait for log_every steps."
        )
    return drawn_charts


def _lines(run: Run, name: str, runs: Sequence[Run]) -> list[Line]:
    points = [(step, values[name]) for step, values in run.metrics.items() if name in values]
    label = name if len(runs) == 1 else f"{run.folder}: {name}"
    if (every := ceil(len(points) / MAX_POINTS)) > 1:
        label += f" (1 of {every} values)"
        points = [*points[:-1:every], points[-1]]
    return [Line(label, points)] if points else []


def write_png(runs: Sequence[Run], path: Path, *, title: str) -> None:
    """Write the charts as an image.

    Raises:
        MissingExtraError: matplotlib is not installed.
        TrainingError: there are no values.
        OSError: the file cannot be written.
    """
    with require_extras("a PNG of 'runs plot'", "plot"):
        from matplotlib.figure import Figure
    drawn_charts = charts(runs)
    figure = Figure(figsize=(9, 3.2 * len(drawn_charts)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, chart in zip(
        figure.subplots(len(drawn_charts), squeeze=False)[:, 0], drawn_charts, strict=True
    ):
        for line in chart.lines:
            steps, values = zip(*line.points, strict=True)
            # an underscore at its beginning would hide a label
            axes.plot(steps, values, marker="." if len(steps) < 50 else "", label=f" {line.label}")
        axes.set(title=chart.title, xlabel="step")
        for text in axes.legend(fontsize="small").get_texts():
            text.set_parse_math(False)
    figure.savefig(path, format="png", dpi=120)


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
svg { width: 100%; height: auto } svg text { font-size: 12px; fill: #555 } ul { list-style: none; padding: 0 }
li { display: inline-block; margin-right: 1.5rem } .scroll { overflow-x: auto }
td, th { padding: .2rem .6rem .2rem 0; text-align: left; vertical-align: top; white-space: pre-wrap }
img { min-width: 4rem; image-rendering: pixelated; display: block }"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The content security policy of a page: the browser loads nothing."""


Rows = dict[tuple[str, str], dict[str, str]]
"""Cells of a table in HTML by column, by the key and the label of a row: labels may repeat."""


def page(runs: Sequence[Run], *, title: str) -> str:
    """Return an HTML page with the charts, and the validation drawings and answers of each run by step.

    Raises:
        TrainingError: there are no values, or a file of a run is damaged.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>\n<h1>{escape(title)}</h1>"
    ]
    for chart in charts(runs):
        keys = "".join(
            f"<li><span style='color: {COLORS[i % len(COLORS)]}'>■</span> {escape(line.label)}"
            f" {line.points[-1][1]:.4g}</li>"
            for i, line in enumerate(chart.lines)
        )
        parts.append(f"<h2>{escape(chart.title)}</h2>\n{svg(chart)}\n<ul>{keys}</ul>")
    for run in runs:
        steps = [f"step {validation.step:,}" for validation in run.validation]
        images: Rows = {}
        answers: Rows = {}
        for step, validation in zip(steps, run.validation, strict=True):
            for path in validation.drawings:
                prompt = run.prompt(path)
                image = f'<img alt="{escape(prompt)}" src="{_data_uri(path)}">'
                images.setdefault((path.name, prompt), {})[step] = image
            for i, answer in enumerate(validation.answers):
                answers.setdefault((str(i), answer["question"]), {})[step] = escape(answer["answer"])
        for heading, cells in (("Drawings", images), ("Answers", answers)):
            if cells:
                parts.append(f"<h2>{heading}: {escape(str(run.folder))}</h2>\n{_table(steps, cells)}")
    return "\n".join(parts) + "\n</html>\n"


def _table(columns: Sequence[str], rows: Rows) -> str:
    """Return a table of cells in HTML."""
    head = "".join(f"<th>{escape(column)}</th>" for column in ("", *columns))
    body = ""
    for (_, label), cells in rows.items():
        values = "".join(f"<td>{cells.get(column, '')}</td>" for column in columns)
        body += f"<tr><th>{escape(label)}</th>{values}</tr>\n"
    return f"<div class=scroll><table><tr>{head}</tr>\n{body}</table></div>"


def _data_uri(path: Path) -> str:
    from PIL import Image

    with foreign_errors(path, TrainingError, "Remove it."):
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


WIDTH, HEIGHT, MARGIN = 900, 300, 56


def svg(chart: Chart) -> str:
    """Return a chart as SVG: axes with ticks, and a line, with dots if it has few points, for each metric."""
    points = [point for line in chart.lines for point in line.points]
    (first, last), (low, high) = (_span([point[axis] for point in points]) for axis in (0, 1))

    def x(step: float) -> str:
        return f"{MARGIN + (step - first) / (last - first) * (WIDTH - MARGIN - 12):.1f}"

    def y(value: float) -> str:
        return f"{HEIGHT - 28 - (value - low) / (high - low) * (HEIGHT - 40):.1f}"

    drawn = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{escape(chart.title)}'>"]
    for value in ticks(low, high):
        drawn.append(f"<line x1={MARGIN} x2={WIDTH - 12} y1={y(value)} y2={y(value)} stroke='#ddd' />")
        drawn.append(f"<text x={MARGIN - 6} y={y(value)} dy='.3em' text-anchor=end>{value:.4g}</text>")
    for step in ticks(first, last):
        drawn.append(f"<text x={x(step)} y={HEIGHT - 8} text-anchor=middle>{step:,.6g}</text>")
    for i, line in enumerate(chart.lines):
        color = COLORS[i % len(COLORS)]
        path = " ".join(f"{x(step)},{y(value)}" for step, value in line.points)
        drawn.append(f"<polyline points='{path}' fill=none stroke='{color}' stroke-width=1.5 />")
        if len(line.points) < 50:
            drawn += [
                f"<circle cx={x(step)} cy={y(value)} r=2.5 fill='{color}' />" for step, value in line.points
            ]
    return "\n".join([*drawn, "</svg>"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest value, or a wider span around values that are almost equal."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    pad = 0.0 if high - low > max(1e-9 * size, 1e-290) else size / 2 if size > 1e-290 else 1.0
    return low - pad, high + pad


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return up to ``most`` round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    power = 10.0 ** floor(log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most - 1)
    return [i * step for i in range(ceil(low / step), floor(high / step) + 1)]
