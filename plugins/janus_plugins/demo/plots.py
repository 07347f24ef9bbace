"""Images of figures, as data URIs: curves, a confusion matrix, strips of small images."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

INK, ACCENT = "#1f2933", "#2563eb"
COLOURS = {"loss/text": "#2563eb", "loss/image": "#ea580c"}  # of curves with names that stages share


def strip(images: Sequence[Image.Image], across: int, gap: int = 3) -> NDArray[np.uint8]:
    """Lay up to ``across`` images of one size side by side on white."""
    images = list(images)[:across]
    width, height = images[0].size
    sheet = Image.new("L", (across * (width + gap) - gap, height + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image.convert("L"), (i * (width + gap), 0))
    return np.asarray(sheet)


def grow(image: Image.Image, times: int = 2) -> Image.Image:
    """Enlarge a sheet of small images."""
    return image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


def as_uri(greys: NDArray[np.uint8]) -> str:
    """Return greys (H, W) as a PNG in a data URI, enlarged for screens that show more than a pixel each."""
    file = BytesIO()
    grow(Image.fromarray(greys)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Draw the losses of each phase over its steps, a small panel each."""
    columns = 2
    rows = max(1, -(-len(logs) // columns))
    figure = Figure(figsize=(7.2, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (phase, lines) in zip(panels, logs.items(), strict=False):
        for name in sorted({name for line in lines for name in line if name.startswith("loss/")}):
            points = [(line["step"], line[name]) for line in lines if name in line]
            panel.plot(
                *zip(*points, strict=True), label=name.removeprefix("loss/"), color=COLOURS.get(name), lw=1.4
            )
        panel.set_title(phase, loc="left", fontsize=10, color=INK)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
        _plain(panel)
    for panel in panels[len(logs) :]:
        panel.set_axis_off()
    return _svg(figure)


def confusion_matrix(table: NDArray[np.int64], names: Sequence[str]) -> str:
    """Draw counts (classes, classes + 1): rows are what was shown, columns what was answered."""
    if not table[:, -1].any():
        table = table[:, :-1]
    labels = [*names, "none"][: table.shape[1]]
    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    panel = figure.subplots()
    share = table / table.sum(1, keepdims=True).clip(1)
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(table):
        if count:
            colour = "white" if share[row, column] > 0.5 else INK
            panel.text(column, row, str(count), ha="center", va="center", fontsize=9, color=colour)
    panel.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=9)
    panel.set_yticks(range(len(names)), list(names), fontsize=9)
    panel.set_xlabel("answered", color=INK)
    panel.set_ylabel("shown", color=INK)
    _plain(panel)
    return _svg(figure)


def _plain(panel: Any) -> None:
    panel.tick_params(colors="#52606d", labelsize=8, length=2)
    for side, line in panel.spines.items():
        line.set_visible(side in ("left", "bottom"))
        line.set_color("#cbd2d9")


def _svg(figure: Figure) -> str:
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(file.getvalue()).decode()}"
