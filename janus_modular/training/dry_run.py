"""What a run would do, said before it does it: what learns, the memory, samples and tokens, epochs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from janus_modular.foreign import printable
from janus_modular.model.batch import Batch
from janus_modular.model.device import choose_device
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.sequence import IGNORE_INDEX
from janus_modular.training.bad_samples import COUNTED
from janus_modular.training.initial_model import initial_model
from janus_modular.training.mixture import Mixture
from janus_modular.training.run_folder import check_output, check_single_process
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import StepBatch
from janus_modular.training.train import autocast_dtype, open_sources, prepare
from janus_modular.training.trainable import choose, table


def dry_run(config: TrainConfig, plugins: Plugins, console: Console) -> None:
    """Print all that can be known without training. Weights are not read; the data of one step are.

    What needs no data is printed first, so that it is there even where the data are not.

    Raises:
        JanusError: whatever would stop the run.
    """
    check_single_process()
    check_output(Path(config.output))
    assembly = initial_model(config, plugins, "meta")
    model = assembly.model
    choose(model, config.learn)
    console.print(table(model))
    half = autocast_dtype(config.dtype, choose_device(config.device)) is not None
    memory = estimate(model, half=half)
    console.print(
        f"weights {_gb(memory.parameters)}, gradients {_gb(memory.gradients)}, AdamW {_gb(memory.optimizer)}"
    )
    preparation = prepare(config, open_sources(config, plugins), model, assembly.processor)
    work = preparation.step(0)
    console.print(_step(config, work))
    console.print(epochs_table(preparation.mixture, config.schedule.last))
    for bad_sample in work.bad_samples:
        where = f"source '{bad_sample.source}', sample {bad_sample.index}"
        console.print(
            f"{COUNTED[bad_sample.action]} {where}: {printable(bad_sample.reason)}",
            markup=False,
            highlight=False,
        )
    console.print(_memory(estimate(model, work, half=half)))


def _step(config: TrainConfig, work: StepBatch) -> Table:
    view = Table("source", "samples", "tokens", title="A step (the first)")
    for column in view.columns[1:]:
        column.justify = "right"
    for name, samples in work.samples.items():
        view.add_row(name, f"{samples:,}", f"{work.tokens[name]:,}")
    view.add_section()
    view.add_row("all", f"{sum(work.samples.values()):,}", f"{sum(work.tokens.values()):,}")
    rows = sum(len(batch.tokens) for batch in work.batches)
    room = sum(batch.tokens.numel() for batch in work.batches)
    filled = sum(work.tokens.values()) / room
    pieces = f" in {len(work.batches)} pieces" if len(work.batches) > 1 else ""
    view.caption = (
        f"{rows} row{'s' if rows > 1 else ''}{pieces}, {filled:.0%} filled; {work.supervised:,} positions"
        f" supervised; {config.schedule.last:,} steps"
    )
    return view


def _memory(memory: Memory) -> str:
    return (
        f"activations about {_gb(memory.activations)} (each linear layer's input and output, text logits"
        f" three times; attention scores and the allocator's waste not counted);"
        f" in all about {_gb(memory.total)}"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


@dataclass(frozen=True)
class SourceUse:
    """What a run takes from a source."""

    source: str
    samples: int  # that the source has
    taken: int  # by the whole run

    @property
    def epochs(self) -> float:
        """How often each sample is taken, on average."""
        return self.taken / self.samples


def source_use(mixture: Mixture, steps: int) -> list[SourceUse]:
    """Return what ``steps`` steps take from each source."""
    taken = mixture.taken(steps)
    return [SourceUse(name, len(source), taken[name]) for name, source in mixture.sources.items()]


HEADS = ("source", "samples", "taken", "epochs")


def cells(use: SourceUse) -> tuple[str, str, str, str]:
    """Return a row below ``HEADS``."""
    return use.source, f"{use.samples:,}", f"{use.taken:,}", f"{use.epochs:,.3g}"


def epochs_table(mixture: Mixture, steps: int) -> Table:
    """Return the table for the terminal."""
    view = Table(*HEADS, title=f"The run: {steps:,} steps of {mixture.batch:,} samples")
    for column in view.columns[1:]:
        column.justify = "right"
    for use in source_use(mixture, steps):
        view.add_row(*cells(use))
    return view


FULL = 4  # bytes of a float32


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs."""

    parameters: int  # all of them, in float32
    gradients: int  # of what learns
    optimizer: int  # AdamW's two averages for what learns
    activations: int  # kept for the backward pass; an estimate

    @property
    def total(self) -> int:
        """All together."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def estimate(model: JanusModel, work: StepBatch | None = None, *, half: bool = False) -> Memory:
    """Count what parameters, gradients and AdamW take; estimate activations of the largest batch in ``work``.

    The estimate: every linear layer keeps what goes in and what comes out, once a
    position, in bfloat16 if ``half`` (a decoder layer of width D and intermediate I so keeps 11 D + 3 I
    numbers, near the count of Korthikanti et al. 2022, table 2, for attention that keeps no scores).
    Text logits are kept three times, in float32. What is frozen below all that learns keeps nothing.
    """
    everything = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = 0 if work is None else max(_kept(model, batch, 2 if half else FULL) for batch in work.batches)
    return Memory(FULL * everything, FULL * learns, 2 * FULL * learns, kept)


def _kept(model: JanusModel, batch: Batch, width: int) -> int:
    vocab = model.backbone.vocab_size
    positions = batch.tokens.numel()
    backbone = _per_position(model.backbone, skip=vocab) * positions  # type: ignore[arg-type]
    logits = 3 * FULL * vocab * int((batch.labels != IGNORE_INDEX).sum())
    seen = 0
    if batch.understanding_pixels is not None:
        features = len(batch.understanding_pixels) * model.understanding.num_tokens
        for part in (model.understanding.encoder, model.understanding.adaptor):
            seen += _per_position(part) * features  # type: ignore[arg-type]
    drawn = 0
    if batch.generation_pixels is not None:
        codes = len(batch.generation_pixels) * model.generation.num_tokens
        apart = tuple(f"{name}." for name in model.generation.frozen_submodules)
        drawn = _per_position(model.generation, apart=apart) * codes  # type: ignore[arg-type]
    return width * (backbone + seen + drawn) + logits


def _per_position(module: nn.Module, *, skip: int | None = None, apart: tuple[str, ...] = ()) -> int:
    """Add up the widths going in and out of linear layers; 0 where a gradient never comes.

    It comes to what learns, and to the backbone (``skip`` is its vocabulary) whether that learns or not:
    the adaptors are below it. What is trained ``apart``, generation's tokenizer, gets none.
    """
    named = module.named_modules()
    layers = [one for name, one in named if isinstance(one, nn.Linear) and not name.startswith(apart)]
    carries = any(p.requires_grad for p in module.parameters()) or skip is not None
    return sum(one.in_features + one.out_features for one in layers if one.out_features != skip) * carries
