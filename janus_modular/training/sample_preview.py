"""A sheet of samples as the model gets them: transformed images, and words with what is learned marked."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from janus_modular.errors import ConfigError
from janus_modular.plugins import Plugins
from janus_modular.processing.image_io import to_image
from janus_modular.processing.processor import Processor
from janus_modular.sequence import IGNORE_INDEX
from janus_modular.sequence import Sequence as TokenSequence
from janus_modular.training.bad_samples import COUNTED
from janus_modular.training.dry_run import HEADS, cells, source_use
from janus_modular.training.initial_model import initial_model
from janus_modular.training.mixture import Mixture, SampleRef
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import PreparedSample
from janus_modular.training.train import open_sources, prepare


@dataclass(frozen=True)
class Span:
    """Neighbouring positions of one kind, all learned or all read."""

    kind: Literal["text", "read", "draw"]
    positions: int
    learned: bool
    text: str = ""
    pixels: NDArray[np.uint8] | None = None  # (3, H, W)


@dataclass(frozen=True)
class SamplePreview:
    """One sample of the sheet."""

    source: str
    index: int
    spans: list[Span]
    note: str = ""  # what was done because a sample could not be used as it is

    @property
    def heading(self) -> str:
        """Whose it is, and how long."""
        positions = sum(one.positions for one in self.spans)
        learned = sum(one.positions for one in self.spans if one.learned)
        note = f" ({self.note})" if self.note else ""
        return f"{self.source}, sample {self.index}: {positions} positions, {learned} learned{note}"


@dataclass(frozen=True)
class StepPreview:
    """Samples of a step, and how often the run goes through each source."""

    samples: list[SamplePreview]
    mixture: Mixture
    steps: int  # of the run


def look(config: TrainConfig, plugins: Plugins, *, n: int, step: int = 0) -> StepPreview:
    """Take ``n`` samples of a step, of each source in turn; of a source that it leaves out, the next.

    Raises:
        ConfigError: the run ends before that step.
        JanusError: the config or a sample cannot be used.
    """
    if step >= (last := config.schedule.last):
        raise ConfigError(
            f"step {step:,}: the run's last step is {last - 1:,}, counted from 0 (its schedule has {last:,}"
            " steps). Choose one up to that."
        )
    assembly = initial_model(config, plugins, "meta")
    processor = assembly.processor
    preparation = prepare(config, open_sources(config, plugins), assembly.model, processor)
    mixture = preparation.mixture
    planned: dict[str, list[SampleRef]] = {name: [] for name in mixture.sources}
    for draw in mixture.plan(step):
        planned[draw.source].append(draw)
    taken = mixture.taken(step)
    turns = zip_longest(*(draws or [SampleRef(name, taken[name])] for name, draws in planned.items()))
    draws = [draw for turn in turns for draw in turn if draw is not None][:n]
    samples = [each for draw in draws for each in _shown(preparation.prepare(draw), mixture, processor)]
    return StepPreview(samples, mixture, config.schedule.last)


def _shown(prepared: PreparedSample, mixture: Mixture, processor: Processor) -> Iterator[SamplePreview]:
    draw = prepared.draw
    index = mixture.index(draw)
    notes = [
        f"{'' if bad_sample.index == index else f'in place of sample {bad_sample.index}, '}"
        f"{COUNTED[bad_sample.action]}: {bad_sample.reason}"
        for bad_sample in prepared.bad_samples
    ]
    for sequence in prepared.sequences:
        yield SamplePreview(draw.source, index, [*spans(sequence, processor)], "; ".join(notes))


def spans(sequence: TokenSequence, processor: Processor) -> Iterator[Span]:
    """Cut a sequence where the kind of its positions changes, or whether they are learned.

    A word is learned where the label before it asks for it.
    """
    learned = np.concatenate([[False], sequence.labels[:-1] != IGNORE_INDEX])
    read, drawn = iter(sequence.understanding_pixels), iter(sequence.generation_pixels)
    supervised = iter(sequence.generation_supervised)
    at = 0
    while at < len(sequence):
        if sequence.understanding_mask[at]:
            yield Span("read", size := processor.image_tokens, False, pixels=next(read))
        elif sequence.generation_mask[at] and processor.drawing:
            yield Span("draw", size := processor.drawing.num_tokens, next(supervised), pixels=next(drawn))
        else:
            other = sequence.understanding_mask | sequence.generation_mask | (learned != learned[at])
            size = int(np.append(other[at:], True).argmax())
            text = processor.tokenizer.core.decode(
                sequence.tokens[at : at + size].tolist(), skip_special_tokens=False
            )
            yield Span("text", size, bool(learned[at]), text)
        at += size


def as_text(sample: SamplePreview) -> Text:
    """Write a sample for the terminal: learned words in bold green, images as their size."""
    view = Text(sample.heading + "\n", style="bold")
    for one in sample.spans:
        words = one.text if one.kind == "text" else f"[image to {one.kind}, {one.positions} positions]"
        view.append(
            words, "bold green" if one.learned else "not bold dim" if one.kind == "text" else "not bold cyan"
        )
    return view.append("\n")


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
section { border-top: 1px solid #ccc; padding: 1rem 0 } h2 { font-size: 1rem; margin: 0 0 .5rem }
.words { white-space: pre-wrap; color: #888 } .learned { color: #064; background: #d8f5e3; font-weight: 600 }
figure { display: inline-block; margin: .2rem; vertical-align: middle; color: #888; font-size: .8rem }
img { max-width: 12rem; min-width: 4rem; border: 2px solid #ccc; image-rendering: pixelated; display: block }
figure.learned img { border-color: #2a9d5c } td { padding: 0 1rem 0 0; text-align: right }"""


def as_html(preview: StepPreview, *, title: str) -> str:
    """Write samples as one page that needs no other file."""
    name = escape(title)
    page = (
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>\n<h1>{name}</h1>\n"
        "<p>Green is learned; grey is only read. Images are what the model gets.</p>\n"
    )
    for sample in preview.samples:
        words = "".join(map(_html, sample.spans))
        page += f"<section><h2>{escape(sample.heading)}</h2><div class=words>{words}</div></section>\n"
    rows = [HEADS, *map(cells, source_use(preview.mixture, preview.steps))]
    table = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return page + f"<h2>The run: {preview.steps:,} steps</h2>\n<table>{table}</table>\n"


def _html(one: Span) -> str:
    mark = " class=learned" if one.learned else ""
    if one.pixels is None:
        return f"<span{mark}>{escape(one.text)}</span>"
    buffer = io.BytesIO()
    to_image(one.pixels).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    what = f"{'read' if one.kind == 'read' else 'drawn'}, {one.positions} positions"
    return f"<figure{mark}><img src='data:image/png;base64,{image}'>{what}</figure>"
