"""What the reports of demos are made of: strips of images, loss curves, a page that needs no other file."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from janus_modular.atomic_writes import write_text
from janus_plugins.demo.schema import DemoConfig

STRIP_LENGTH = 12  # images of a strip


def write_page(template: str, values: Mapping[str, Any], path: Path) -> None:
    """Fill a template of this folder, and write the page."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template(template).render(**values))


def read_logs(output: Path, config: DemoConfig) -> dict[str, list[dict[str, float]]]:
    """Return the logged metrics of each phase, in the order of training."""
    logs = {}
    for name in ("classifier", *config.stages):
        file = output / "phases" / name / "metrics.jsonl"
        if file.is_file():
            logs[name] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return logs


INK = "#1f2933"
CURVE_COLOURS = {"loss/text": "#2563eb", "loss/image": "#ea580c"}


def strip(images: Sequence[Image.Image], length: int = STRIP_LENGTH, gap: int = 3) -> NDArray[np.uint8]:
    """Lay up to ``length`` images of one size side by side on white; return the pixels (H, W, 3)."""
    images = list(images)[:length]
    width, height = images[0].size
    canvas = Image.new("RGB", (length * (width + gap) - gap, height + gap), "white")
    for i, image in enumerate(images):
        canvas.paste(image.convert("RGB"), (i * (width + gap), 0))
    return np.asarray(canvas)


def enlarge(image: Image.Image, times: int = 2) -> Image.Image:
    """Enlarge an image of small images."""
    return image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


def captioned(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """Lay images out in rows on white, each with its caption below."""
    side, margin, text = 96, 12, 30
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (side + 4 * margin), rows * (side + margin + text)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (side + 4 * margin), i // columns * (side + margin + text)
        canvas.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x + 2 * margin, y + margin))
        pen.text((x + 2 * margin + side // 2, y + side + margin + 12), caption, INK, font, anchor="mm")
    return canvas


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Return pixels (H, W, 3) as a PNG in a data URI, enlarged for high-resolution screens."""
    file = BytesIO()
    enlarge(Image.fromarray(pixels)).save(file, "PNG", optimize=True)
    return png_uri(file.getvalue())


def png_uri(png: bytes) -> str:
    """Return the bytes of a PNG file as a data URI."""
    return f"data:image/png;base64,{b64encode(png).decode()}"


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Plot the losses of each phase over its steps, a panel for each phase; return a data URI."""
    columns = 2
    rows = max(1, -(-len(logs) // columns))
    figure = Figure(figsize=(7.2, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (phase, lines) in zip(panels, logs.items(), strict=False):
        for name in sorted({name for line in lines for name in line if name.startswith("loss/")}):
            points = [(line["step"], line[name]) for line in lines if name in line]
            panel.plot(
                *zip(*points, strict=True),
                label=name.removeprefix("loss/"),
                color=CURVE_COLOURS.get(name),
                lw=1.4,
            )
        panel.set_title(phase, loc="left", fontsize=10, color=INK)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
        style(panel)
    for panel in panels[len(logs) :]:
        panel.set_axis_off()
    return svg_uri(figure)


def style(panel: Any) -> None:
    """Give a panel quiet axes: two thin lines, small labels."""
    panel.tick_params(colors="#52606d", labelsize=8, length=2)
    for side, line in panel.spines.items():
        line.set_visible(side in ("left", "bottom"))
        line.set_color("#cbd2d9")


def svg_uri(figure: Figure) -> str:
    """Return a figure as an SVG in a data URI."""
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(file.getvalue()).decode()}"
