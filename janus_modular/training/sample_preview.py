"""A preview of training samples as the model gets them: transformed images, supervised text marked."""

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
from janus_modular.training.bad_samples import METRIC_NAMES
from janus_modular.training.dry_run import USE_COLUMNS, use_rows
from janus_modular.training.initial_model import initial_model
from janus_modular.training.mixture import Mixture, SampleRef
from janus_modular.training.objective import refuse_examples
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_builder import PreparedSample


@dataclass(frozen=True)
class Span:
    """Neighbouring positions of one modality, all supervised or none."""

    modality: Literal["text", "image_input", "image_target"]
    positions: int
    supervised: bool
    text: str = ""
    pixels: NDArray[np.uint8] | None = None  # (3, H, W)


@dataclass(frozen=True)
class SamplePreview:
    """The spans of one sample."""

    source: str
    index: int
    spans: list[Span]
    note: str = ""  # what was done to samples that could not be used unchanged

    @property
    def heading(self) -> str:
        """Return source, index and length."""
        positions = sum(span.positions for span in self.spans)
        supervised = sum(span.positions for span in self.spans if span.supervised)
        note = f" ({self.note})" if self.note else ""
        return f"{self.source}, sample {self.index}: {positions} positions, {supervised} supervised{note}"


@dataclass(frozen=True)
class StepPreview:
    """Samples of a step, and the mixture that they come from."""

    samples: list[SamplePreview]
    mixture: Mixture
    steps: int  # of the run


def preview_step(config: TrainConfig, plugins: Plugins, *, n: int, step: int = 0) -> StepPreview:
    """Return ``n`` samples of a step, from each source in turn; for a source without any, of a later step.

    Raises:
        ConfigError: the run ends before that step.
        JanusError: the config or a sample cannot be used.
    """
    if step >= (steps := config.schedule.num_steps):
        raise ConfigError(
            f"step {step:,}: the run's last step is {steps - 1:,}, counted from 0 (its schedule has {steps:,}"
            " steps). Choose one up to that."
        )
    assembly = initial_model(config, plugins, "meta")
    refuse_examples(config, assembly.model, plugins, "`data check` reads its samples")
    processor = assembly.processor
    builder = batch_builder(config, open_sources(config, plugins), assembly.model, processor)
    mixture = builder.mixture
    by_source: dict[str, list[SampleRef]] = {name: [] for name in mixture.sources}
    for ref in mixture.sample_refs(step):
        by_source[ref.source].append(ref)
    before = mixture.samples_before(step)
    rounds = zip_longest(*(refs or [SampleRef(name, before[name])] for name, refs in by_source.items()))
    chosen = [ref for refs in rounds for ref in refs if ref is not None][:n]
    samples = [preview for ref in chosen for preview in previews(builder.prepare(ref), mixture, processor)]
    return StepPreview(samples, mixture, steps)


def previews(prepared: PreparedSample, mixture: Mixture, processor: Processor) -> Iterator[SamplePreview]:
    """Yield a preview of each sequence of a sample."""
    index = mixture.index(prepared.ref)
    notes = [
        f"{'' if bad_sample.index == index else f'in place of sample {bad_sample.index}, '}"
        f"{METRIC_NAMES[bad_sample.action]}: {bad_sample.reason}"
        for bad_sample in prepared.bad_samples
    ]
    for sequence in prepared.sequences:
        yield SamplePreview(prepared.ref.source, index, [*spans(sequence, processor)], "; ".join(notes))


def spans(sequence: TokenSequence, processor: Processor) -> Iterator[Span]:
    """Divide a sequence where the modality of its positions changes, or whether they are supervised.

    A text token is supervised where the label at the position before it is set.
    """
    supervised = np.concatenate([[False], sequence.labels[:-1] != IGNORE_INDEX])
    inputs = zip(sequence.understanding_pixels, sequence.input_counts, strict=True)
    targets = iter(sequence.generation_images)
    targets_supervised = iter(sequence.generation_supervised)
    is_image = sequence.understanding_mask | sequence.generation_mask
    start = 0
    while start < len(sequence):
        if sequence.understanding_mask[start]:
            image_input, size = next(inputs)
            yield Span("image_input", size, False, pixels=image_input)
        elif sequence.generation_mask[start] and processor.drawing:
            size = processor.drawing.num_tokens
            image = next(targets)
            is_encoded = image.dtype != np.uint8
            label = f"[encoded image, {image.dtype} {image.shape}]" if is_encoded else ""
            pixels = None if is_encoded else image
            yield Span("image_target", size, next(targets_supervised), label, pixels)
        else:
            ends = is_image | (supervised != supervised[start])
            size = int(np.append(ends[start:], True).argmax())
            text = processor.tokenizer.core.decode(
                sequence.tokens[start : start + size].tolist(), skip_special_tokens=False
            )
            yield Span("text", size, bool(supervised[start]), text)
        start += size


VERBS = {"image_input": "read", "image_target": "draw"}


def as_text(sample: SamplePreview) -> Text:
    """Return a sample for the terminal: supervised text in bold green, images as their size."""
    view = Text(sample.heading + "\n", style="bold")
    for span in sample.spans:
        is_text = span.modality == "text"
        words = span.text if is_text else f"[image to {VERBS[span.modality]}, {span.positions} positions]"
        style = "bold green" if span.supervised else "not bold dim" if is_text else "not bold cyan"
        view.append(words, style)
    return view.append("\n")


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
section { border-top: 1px solid #ccc; padding: 1rem 0 } h2 { font-size: 1rem; margin: 0 0 .5rem }
.words { white-space: pre-wrap; color: #888 } .supervised { color: #064; background: #d8f5e3 }
figure { display: inline-block; margin: .2rem; vertical-align: middle; color: #888; font-size: .8rem }
img { max-width: 12rem; min-width: 4rem; border: 2px solid #ccc; image-rendering: pixelated; display: block }
figure.supervised img { border-color: #2a9d5c } td { padding: 0 1rem 0 0; text-align: right }"""


def as_html(preview: StepPreview, *, title: str) -> str:
    """Return samples as an HTML page that needs no other file."""
    name = escape(title)
    page = (
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>\n<h1>{name}</h1>\n"
        "<p>Green is supervised; grey is only read. Images are what the model gets.</p>\n"
    )
    for sample in preview.samples:
        words = "".join(map(_span_html, sample.spans))
        page += f"<section><h2>{escape(sample.heading)}</h2><div class=words>{words}</div></section>\n"
    rows = [USE_COLUMNS, *use_rows(preview.mixture, preview.steps)]
    table = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return page + f"<h2>The run: {preview.steps:,} steps</h2>\n<table>{table}</table>\n"


def _span_html(span: Span) -> str:
    mark = " class=supervised" if span.supervised else ""
    if span.pixels is None:
        return f"<span{mark}>{escape(span.text)}</span>"
    buffer = io.BytesIO()
    to_image(span.pixels).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    caption = f"{'read' if span.modality == 'image_input' else 'drawn'}, {span.positions} positions"
    return f"<figure{mark}><img src='data:image/png;base64,{image}'>{caption}</figure>"
