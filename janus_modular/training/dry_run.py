"""What a run would do, said before it does it: what learns, the memory, samples and tokens, epochs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from janus_modular.foreign import printable
from janus_modular.model.device import choose_device
from janus_modular.plugins import Plugins
from janus_modular.training.epochs import epochs_table
from janus_modular.training.estimate import Memory, estimate
from janus_modular.training.initial_model import sketch_model
from janus_modular.training.processes import refuse_several_processes
from janus_modular.training.run_checkpoints import check_output
from janus_modular.training.sample_faults import COUNTED
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import Work
from janus_modular.training.train import choose_autocast, open_sources, prepare
from janus_modular.training.trainable import choose, table


def dry_run(config: TrainConfig, plugins: Plugins, console: Console) -> None:
    """Print all that can be known without training. Weights are not read; the data of one step are.

    What needs no data is printed first, so that it is there even where the data are not.

    Raises:
        JanusError: whatever would stop the run.
    """
    refuse_several_processes()
    check_output(Path(config.output))
    model, processor = sketch_model(config, plugins)
    choose(model, config.learn)
    console.print(table(model))
    half = choose_autocast(config.dtype, choose_device(config.device)) is not None
    memory = estimate(model, half=half)
    console.print(
        f"weights {_gb(memory.parameters)}, gradients {_gb(memory.gradients)}, AdamW {_gb(memory.optimizer)}"
    )
    preparation = prepare(config, open_sources(config, plugins), model, processor())
    work = preparation.step(0)
    console.print(_step(config, work))
    console.print(epochs_table(preparation.mixture, config.schedule.last))
    for fault in work.faults:
        where = f"source '{fault.source}', sample {fault.index}"
        console.print(
            f"{COUNTED[fault.action]} {where}: {printable(fault.reason)}", markup=False, highlight=False
        )
    console.print(_memory(estimate(model, work, half=half)))


def _step(config: TrainConfig, work: Work) -> Table:
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
