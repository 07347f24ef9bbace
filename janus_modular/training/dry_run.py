"""``train --dry-run``: what a run trains, its memory, the samples and tokens of a step, and its epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from torch import nn

from janus_modular.checkpoints.native import read_record
from janus_modular.model.device import choose_device
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.training.data_record import DataRecord
from janus_modular.training.encode_images import open_run_codes
from janus_modular.training.flops import count_flops, describe_uncounted
from janus_modular.training.initial_model import initial_model
from janus_modular.training.memory import estimate_memory
from janus_modular.training.mixture import Mixture
from janus_modular.training.objective import reads_examples
from janus_modular.training.processes import Processes
from janus_modular.training.run_folder import check_output
from janus_modular.training.run_setup import (
    autocast_dtype,
    check_training,
    find_checkpoint,
    open_sources,
    open_validation,
    step_builder,
)
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_builder import StepBatch
from janus_modular.training.trainable import check_reached, trainable_table


def dry_run(config: TrainConfig, plugins: Plugins, console: Console, *, resume: bool = False) -> None:
    """Print what can be known without training. Weights are not read; the data of one step are.

    What needs no data is printed first, so that it is seen even where reading the data fails. With
    ``resume``, the checkpoint to resume from is verified too.

    Raises:
        JanusError: an error that would stop the run.
    """
    processes = Processes.from_environment()
    processes.check_batch(config.batch)
    if not processes.is_first:  # which prints for all
        return
    output = Path(config.output)
    check_output(output)
    checkpoint, _ = find_checkpoint(output, config, resume, plugins=plugins)
    assembly = initial_model(config, plugins, "meta", checkpoint=checkpoint)
    model = assembly.model
    objective, optimizers = check_training(config, model, plugins)
    console.print(trainable_table(model, cast(nn.Module, objective)))
    half = autocast_dtype(config.dtype, choose_device(config.device)) is not None
    layout: dict[str, Any] = {
        "half": half,
        "sharded": [name for name, policy in config.parallel.items() if policy == "fsdp"],
        "world": processes.world,
        "recomputed": config.activation_checkpointing,
        "optimizer": optimizers,
    }
    memory = estimate_memory(model, **layout)
    console.print(
        f"weights {_size(memory.parameters)}, gradients {_size(memory.gradients)},"
        f" optimizer {_size(memory.optimizer)}"
    )
    sources = open_sources(config, plugins)
    if checkpoint is not None:
        record = read_record(checkpoint)["training"]
        DataRecord(sources, config.bad_samples).resume(record, accept=config.changed_data == "accept")
    codes = open_run_codes(config, assembly, plugins)
    builder = step_builder(config, sources, assembly, objective, processes, codes)
    check_reached(model, builder, config)
    open_validation(config, builder, plugins, objective, assembly)
    console.print("the weights were not read; the run checks at its start that all are finite")
    step_batch = builder.build(0)
    console.print(_step_table(step_batch))
    console.print(_step_line(config, step_batch))
    if not reads_examples(objective):
        console.print(_flops_line(model, step_batch))
    console.print(epochs_table(builder.mixture, config.schedule.num_steps))
    for bad_sample in step_batch.bad_samples:
        console.print(str(bad_sample), markup=False, highlight=False)
    if not reads_examples(objective):
        console.print(_memory_line(model, step_batch, layout))


def _step_table(step_batch: StepBatch) -> Table:
    title = "A step (the first)"
    if not step_batch.tokens:  # examples
        view = Table("source", "samples", title=title)
        view.columns[1].justify = "right"
        for name, samples in step_batch.samples.items():
            view.add_row(name, f"{samples:,}")
        return view
    view = Table("source", "samples", "tokens", title=title)
    for column in view.columns[1:]:
        column.justify = "right"
    for name, samples in step_batch.samples.items():
        view.add_row(name, f"{samples:,}", f"{step_batch.tokens[name]:,}")
    view.add_section()
    tokens = sum(step_batch.tokens.values())
    view.add_row("all", f"{sum(step_batch.samples.values()):,}", f"{tokens:,}")
    return view


def _step_line(config: TrainConfig, step_batch: StepBatch) -> str:
    if not step_batch.tokens:
        count = len(step_batch.batches)
        micro_batches = f" in {count} micro-batches" if count > 1 else ""
        return f"{step_batch.supervised:,} examples{micro_batches}; {config.schedule.num_steps:,} steps"
    tokens = sum(step_batch.tokens.values())
    rows = sum(len(batch.tokens) for batch in step_batch.batches)
    filled = tokens / sum(batch.tokens.numel() for batch in step_batch.batches)
    count = len(step_batch.batches)
    micro_batches = f" in {count} micro-batches" if count > 1 else ""
    return (
        f"{rows} row{'s' if rows > 1 else ''}{micro_batches}, {filled:.0%} filled;"
        f" {step_batch.supervised:,} positions supervised; {config.schedule.num_steps:,} steps"
    )


def _flops_line(model: JanusModel, step_batch: StepBatch) -> str:
    """Return what a step computes in this process, by component, most first."""
    counts = count_flops(model)
    flops = counts.of_batches(step_batch.batches)
    total = sum(flops.values())
    shares = ", ".join(
        f"{name} {count / total:.1%}" for name, count in sorted(flops.items(), key=lambda item: -item[1])
    )
    uncounted = describe_uncounted(counts.uncounted)
    return f"{total / 1e12:,.3g} TFLOPs: {shares}" + (f"\n{uncounted}" if uncounted else "")


@dataclass(frozen=True)
class SourceUse:
    """How many samples a run takes from a source."""

    source: str
    samples: int  # in the source
    samples_taken: int  # by the whole run

    @property
    def epochs(self) -> float:
        """Return how often each sample is taken, on average."""
        return self.samples_taken / self.samples


USE_COLUMNS = ("source", "samples", "taken", "epochs")


def use_rows(mixture: Mixture, steps: int) -> list[tuple[str, str, str, str]]:
    """Return the cells below ``USE_COLUMNS``: what ``steps`` steps take from each source."""
    samples_taken = mixture.samples_before(steps)
    uses = [SourceUse(name, len(source), samples_taken[name]) for name, source in mixture.sources.items()]
    return [(use.source, f"{use.samples:,}", f"{use.samples_taken:,}", f"{use.epochs:,.3g}") for use in uses]


def epochs_table(mixture: Mixture, steps: int) -> Table:
    """Return the use of each source as a table for the terminal."""
    view = Table(*USE_COLUMNS, title=f"The run: {steps:,} steps of {mixture.batch:,} samples")
    for column in view.columns[1:]:
        column.justify = "right"
    for cells in use_rows(mixture, steps):
        view.add_row(*cells)
    return view


def _memory_line(model: JanusModel, step_batch: StepBatch, layout: Mapping[str, Any]) -> str:
    """Return the memory of the step, simulated with its largest micro-batches."""
    try:
        memory = estimate_memory(model, step_batch.batches, **layout)
    except Exception as error:  # a third party's component may raise any on the meta device
        problem = str(error).partition("\n")[0] or type(error).__name__
        return f"activations are not estimated: a component does not run on the meta device: {problem}"
    communication = f", communication {_size(memory.communication)}" if memory.communication else ""
    return (
        f"activations {_size(memory.activations)}{communication}; in all {_size(memory.total)} a process: a"
        " simulated step, without the allocator's waste and kernels' workspaces"
    )


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
