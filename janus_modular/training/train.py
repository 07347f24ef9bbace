"""The training of a stage from a `TrainConfig`; all stages run the same code."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import nn

from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.checkpoints.native import check_rebuilds, read_record
from janus_modular.config import to_plain
from janus_modular.model.device import choose_device
from janus_modular.model.model import JanusModel
from janus_modular.objectives import Objective
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.protocols import Source, Tracker
from janus_modular.training.checkpoint_writer import CheckpointWriter
from janus_modular.training.compilation import compile_blocks
from janus_modular.training.data_record import DataRecord
from janus_modular.training.early_stop import KEY, EarlyStop
from janus_modular.training.encode_images import open_codes
from janus_modular.training.engine import Engine, NonFiniteLossError
from janus_modular.training.flops import count_flops, describe_uncounted
from janus_modular.training.initial_model import check_finite, initial_model
from janus_modular.training.loop import run
from janus_modular.training.non_finite_samples import describe_samples
from janus_modular.training.objective import (
    OBJECTIVE,
    DerivedWeights,
    build_objective,
    own_optimizers,
    reads_examples,
    step_losses,
    trained_modules,
)
from janus_modular.training.parallel import PartLoader, checkpoint_activations, shard_components
from janus_modular.training.processes import Processes
from janus_modular.training.resume import Change, changed_plugins, load_state
from janus_modular.training.run_checkpoints import link_final_model, save_on_error
from janus_modular.training.run_environment import run_environment
from janus_modular.training.run_folder import drop_old, incomplete_checkpoints, run_folder
from janus_modular.training.run_setup import (
    autocast_dtype,
    check_training,
    components_of,
    find_checkpoint,
    open_sources,
    open_validation,
    step_builder,
)
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import BatchBuilder, shared
from janus_modular.training.step_builder import StepBatch, StepBuilder
from janus_modular.training.throughput import Throughput, peak_flops, unknown_peak
from janus_modular.training.trackers import open_trackers
from janus_modular.training.trainable import (
    check_reached,
    set_trainable,
    trainable_table,
    untrained_warning,
)
from janus_modular.training.validation import Validation

log = logging.getLogger(__name__)

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""How lines with paths and values are printed."""


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    title: str = "training",
    plugins: Plugins | None = None,
    sources: Mapping[str, Source] | None = None,
) -> Path:
    """Train one stage; return the folder of the trained model, ``config.output/model``.

    Under torchrun, each process computes a part of the samples of every step.
    ``resume``: continue from the newest checkpoint in ``config.output``; the result is bit-identical to that
    of an uninterrupted run with the same number of processes.
    ``quiet``: no progress bar and no table. ``title``: of the progress bar.
    ``sources``: objects that replace the sources of these names in the config.

    Raises:
        JanusError: the config, the data or a checkpoint cannot be used, or a loss is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM arrived; the step was finished and a checkpoint written.
    """
    processes = Processes.from_environment()
    processes.check_batch(config.batch)
    device = processes.device(choose_device(config.device), config.device)
    plugins = plugins or default_plugins()
    output = Path(config.output)
    quiet = quiet or not processes.is_first
    if not processes.is_first:  # whose warnings are those of all
        logging.getLogger("janus_modular").setLevel(logging.ERROR)
    with ExitStack() as stack:
        stack.enter_context(processes.started(device))
        processes.check_equal("the configuration", to_plain(config))
        processes.on_first(lambda: stack.enter_context(run_folder(output)))
        checkpoint, changes = find_checkpoint(output, config, resume, processes, plugins)
        run = processes.together(
            lambda: _prepare(config, checkpoint, changes, sources, plugins, processes, device, quiet=quiet)
        )
        processes.check_equal("the data", run.record.sources)
        processes.check_equal("the weights at the start", run.weights)
        return _run_steps(run, config, checkpoint, quiet=quiet, title=title)


@dataclass
class _PreparedRun:
    """The objects of a run that is ready to start, in this process."""

    assembly: ModelAssembly
    objective: Objective
    engine: Engine[StepBatch]
    builder: StepBuilder
    derived: DerivedWeights
    record: DataRecord
    trackers: list[Tracker]
    validation: Validation | None
    early_stop: EarlyStop | None
    environment: dict[str, Any]  # recorded in checkpoints
    weights: str  # digest of the initial weights
    throughput: Throughput | None  # None: the peak of the device is not known


def _prepare(
    config: TrainConfig,
    checkpoint: Path | None,
    changes: Sequence[Change],
    sources: Mapping[str, Source] | None,
    plugins: Plugins,
    processes: Processes,
    device: torch.device,
    *,
    quiet: bool,
) -> _PreparedRun:
    """Open the data, build the model and restore the state, without waiting for other processes."""
    output = Path(config.output)
    data = open_sources(config, plugins, sources)
    record = DataRecord(data, config.bad_samples)
    early_stop = EarlyStop(config.validation.early_stop) if config.validation.early_stop else None
    if checkpoint is not None:
        training = read_record(checkpoint)["training"]
        record.resume(training, accept=config.changed_data == "accept")
        if early_stop:
            early_stop.resume(training)
    on_meta = initial_model(config, plugins, "meta").model  # checked before weights are read
    objective, _ = check_training(config, on_meta, plugins)
    torch.manual_seed(config.seed)
    precision = autocast_dtype(config.dtype, device)
    throughput = _throughput(on_meta, objective, config, processes, device, quiet=quiet)

    def shard(model: JanusModel) -> None:
        set_trainable(model, config.learn, objective.trains)
        compile_blocks(model, config.compile)
        checkpoint_activations(model, config.activation_checkpointing)
        shard_components(model, config.parallel, device=device, world=processes.world, dtype=precision)

    loader = PartLoader()
    assembly = initial_model(config, plugins, device, checkpoint=checkpoint, shard=shard, loader=loader)
    model = assembly.model
    set_trainable(model, config.learn, objective.trains)  # loading makes new parameters, in eval mode
    objective = build_objective(config.objective, model, plugins, device)
    for parameter in cast(nn.Module, objective).parameters():
        loader.sample(parameter)
    check_rebuilds(assembly, plugins)  # before training, not at the first checkpoint
    environment: dict[str, Any] = {}
    if processes.is_first:
        environment = run_environment(plugins, components_of(config, assembly, plugins))
    if checkpoint is not None:
        changes = [*changes, *changed_plugins(read_record(checkpoint)["training"], environment)]
    _print_start(assembly, objective, output, checkpoint, changes, quiet=quiet)
    if not processes.is_first:  # the weights are those of rank 0, and dropout is not
        torch.manual_seed(int(np.random.SeedSequence((config.seed, processes.rank)).generate_state(1)[0]))
    codes = open_codes(config, model.generation)
    engine: Engine[StepBatch] = Engine(
        trained_modules(model, objective),
        lambda batch: step_losses(model, batch, device, objective, engine.next_step),
        config.optimizer,
        config.schedule,
        autocast=precision,
        processes=processes,
        ema=config.ema,
        auxiliary=OBJECTIVE,
        optimizers=own_optimizers(objective),
    )
    if checkpoint is not None:
        load_state(checkpoint, engine, config)
        if engine.next_step == config.schedule.num_steps and not quiet:
            done = (
                f"nothing is left to train: all {engine.next_step} steps of the schedule are done. A larger"
                " schedule.steps (or schedule.stop) trains on."
            )
            Console(stderr=True).print(done, **PLAIN)
    check_finite(model, str(checkpoint or config.init or "the model with its pretrained components"))
    derived = DerivedWeights(model, objective.trains)
    builder = step_builder(config, data, assembly, objective, processes, codes)
    check_reached(model, builder, config)
    validation = open_validation(config, builder, plugins, objective, assembly)
    trackers = open_trackers(config, plugins) if processes.is_first else []
    digest = loader.digest.hexdigest()
    return _PreparedRun(
        *(assembly, objective, engine, builder, derived, record, trackers, validation, early_stop),
        *(environment, digest, throughput),
    )


def _throughput(
    on_meta: JanusModel,
    objective: Objective,
    config: TrainConfig,
    processes: Processes,
    device: torch.device,
    *,
    quiet: bool,
) -> Throughput | None:
    """Return what measures MFU of a model on the meta device; None if FLOPs or the peak are unknown."""
    precision = autocast_dtype(config.dtype, device)
    peak, counts = peak_flops(device, precision, config.peak_flops), None
    if reads_examples(objective):
        message = "MFU is not reported: it is counted for batches of token sequences only."
    elif peak is None:
        message = unknown_peak(device, precision)
    else:
        counts = count_flops(on_meta)
        message = describe_uncounted(counts.uncounted)
    if message and not quiet:
        Console(stderr=True).print(message, **PLAIN)
    return None if peak is None or counts is None else Throughput(counts, peak, processes)


def _run_steps(
    prepared: _PreparedRun, config: TrainConfig, checkpoint: Path | None, *, quiet: bool, title: str
) -> Path:
    """Run the steps that remain, and save; return the folder of the trained model."""
    engine, record, output = prepared.engine, prepared.record, Path(config.output)
    validation, early_stop = prepared.validation, prepared.early_stop
    processes = engine.processes
    batches = prepared.builder.build_all(
        engine.next_step,
        config.schedule.num_steps,
        workers=config.workers,
        worker_type=config.worker_type,
    )
    is_sharded = "fsdp" in config.parallel.values() and isinstance(prepared.builder, BatchBuilder)
    counted_batches = record.counting(shared(batches, processes, equal_passes=is_sharded), engine.next_step)
    throughput = prepared.throughput
    timed_batches = throughput.counting(counted_batches) if throughput else counted_batches
    writer, untrained = CheckpointWriter(prepared.assembly, engine, config, checkpoint), list[str]()

    def save_checkpoint(*, background: bool = False) -> None:
        nonlocal untrained
        engine.check_updated()
        prepared.derived.update()
        state: dict[str, Any] = {KEY: early_stop.to_dict()} if early_stop else {}
        state |= {"data": record.to_dict(engine.next_step), "environment": prepared.environment}
        writer.save(state, background=background)
        if (names := engine.untrained()) and names != untrained:
            log.warning(untrained_warning(names, engine.next_step))
        untrained = names

    def after_step(done: int, stopping: bool) -> bool:
        """Validate and save where that is due; return True if the run ends early."""
        writer.poll()
        is_over = False
        if validation and not stopping and validation.is_due(done, config.schedule.num_steps):
            values = validation.run(prepared.assembly, engine, prepared.trackers)
            if early_stop:
                early_stop.update(done, values)
                is_over = early_stop.is_over
        is_last = stopping or is_over or done == config.schedule.num_steps
        if is_last or done % config.checkpoint_every == 0:
            save_checkpoint(background=config.checkpoint_async and not is_last)
        return is_over

    with save_on_error(engine, writer, save_checkpoint), ExitStack() as stack:
        for tracker in prepared.trackers:
            stack.callback(tracker.close)
        stack.callback(batches.close)
        stack.callback(counted_batches.close)
        try:
            if not (early_stop and early_stop.is_over):
                run(
                    engine,
                    timed_batches,
                    title=title,
                    trackers=prepared.trackers,
                    log_every=config.log_every,
                    quiet=quiet,
                    after_step=after_step,
                    rates=throughput.rates if throughput else None,
                )
        except NonFiniteLossError as error:
            model, processor = prepared.assembly.model, prepared.assembly.processor
            note = describe_samples(
                model,
                engine,
                prepared.builder,
                processor,
                output,
                prepared.objective,
                is_sharded=is_sharded,
            )
            error.add_note(note)
            raise
    if early_stop and early_stop.is_over and not quiet:
        Console(stderr=True).print(str(early_stop), **PLAIN)
    checkpoint = writer.last
    assert checkpoint is not None  # saved after the last step

    def finish() -> Path:
        drop_old(output, config.keep)  # a run that was killed after its last checkpoint may have left more
        return link_final_model(output, checkpoint)

    return processes.on_first(finish)


def _print_start(
    assembly: ModelAssembly,
    objective: Objective,
    output: Path,
    checkpoint: Path | None,
    changes: Sequence[Change],
    *,
    quiet: bool,
) -> None:
    """Print what the run starts from and what it trains; changes are printed even if ``quiet``."""
    console = Console(stderr=True)
    if changes:
        lines = "\n".join(f"  {change}" for change in changes)
        console.print(f"settings and plugins that differ from those of {checkpoint}:\n{lines}", **PLAIN)
    if quiet:
        return
    if checkpoint is not None:
        console.print("; ".join([f"resuming from {checkpoint}", *incomplete_checkpoints(output)]), **PLAIN)
    for report in assembly.provenance.pretrained:
        console.print(str(report), **PLAIN)
    console.print(trainable_table(assembly.model, cast(nn.Module, objective)))
