"""Training Janus: a `TrainConfig` becomes a run of the engine. A stage differs from another by data alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from janus_modular.checkpoints.native import check_rebuilds, read_record
from janus_modular.config.errors import FieldError, config_error
from janus_modular.errors import ConfigError, JanusError, TrainingError
from janus_modular.model.build import ModelBuilder
from janus_modular.model.device import choose_device
from janus_modular.model.model import JanusModel, Output
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.processing.prompt_check import check_context, check_prompts
from janus_modular.protocols import Source
from janus_modular.training import run_checkpoints
from janus_modular.training.data_record import DataRecord
from janus_modular.training.engine import Engine, Loss
from janus_modular.training.initial_model import initial_model
from janus_modular.training.loop import run
from janus_modular.training.mixture import Mixture
from janus_modular.training.run_checkpoints import Change, save_on_error
from janus_modular.training.run_folder import check_single_process, run_folder
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import BatchBuilder, StepBatch
from janus_modular.training.trainable import choose, table

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""How lines are printed that hold paths and values."""


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    title: str = "training",
    plugins: Plugins | None = None,
    sources: Mapping[str, Source] | None = None,
) -> Path:
    """Run a stage to its end; return the folder of the finished model (``output/model``).

    With ``resume`` it goes on from the newest checkpoint in ``output``, bit for bit as if it had never
    stopped. ``sources`` replace those of the config by name: for notebooks, and data made on the fly.

    Raises:
        JanusError: the config, the data or a checkpoint cannot be used, or a loss is not finite.
        KeyboardInterrupt: it was interrupted; the step was finished and a checkpoint written.
    """
    check_single_process()
    plugins = plugins or default_plugins()
    output = Path(config.output)
    with run_folder(output):
        checkpoint, changed = _checkpoint(output, config, resume)
        return _train(config, output, checkpoint, changed, sources, plugins, quiet=quiet, title=title)


def _train(
    config: TrainConfig,
    output: Path,
    checkpoint: Path | None,
    changed: Sequence[Change],
    sources: Mapping[str, Source] | None,
    plugins: Plugins,
    *,
    quiet: bool,
    title: str,
) -> Path:
    """Run a stage in its folder, which is this process's own."""
    data = open_sources(config, plugins) if sources is None else sources
    record = DataRecord(data, config.bad_samples)
    if checkpoint is not None:
        record.resume(read_record(checkpoint)["training"], accept=config.changed_data == "accept")
    device = choose_device(config.device)
    choose(initial_model(config, plugins, "meta").model, config.learn)  # errors before weights are read
    torch.manual_seed(config.seed)
    assembly = initial_model(config, plugins, device, checkpoint=checkpoint)
    model = assembly.model
    choose(model, config.learn)
    check_rebuilds(assembly, plugins)  # before anything is trained, not at the first save
    console = Console(stderr=True)
    if changed:
        lines = "\n".join(f"  {change}" for change in changed)
        console.print(f"settings that differ from those of {checkpoint}:\n{lines}", **PLAIN)
    if not quiet:
        if checkpoint is not None:
            lacking = ", ".join(run_checkpoints.newer_without_state(output, checkpoint))
            over = f"; {lacking} cannot be gone on from: no {run_checkpoints.STATE}" if lacking else ""
            console.print(f"going on from {checkpoint}{over}", **PLAIN)
        for report in assembly.provenance.pretrained:
            console.print(str(report), **PLAIN)
        console.print(table(model))
    engine: Engine[StepBatch] = Engine(
        model,
        lambda work: janus_losses(model, work, device),
        config.optimizer,
        config.schedule,
        autocast=autocast_dtype(config.dtype, device),
    )
    if checkpoint is not None:
        run_checkpoints.load_state(checkpoint, engine, config)
    steps = prepare(config, data, model, assembly.processor).steps(
        engine.next_step, config.schedule.last, workers=config.workers
    )
    work = record.counted(steps, engine.next_step)
    try:
        build = ModelBuilder(plugins)
        trackers = [build(tracker, output) for tracker in config.trackers]
    except OSError as error:
        raise TrainingError(
            f"a tracker cannot start: {error}. Is {output} a folder that can be written?"
        ) from error
    saved = checkpoint

    def save() -> Path:
        nonlocal saved
        data = record.to_dict(engine.next_step)
        saved = run_checkpoints.save(output, assembly, engine, config, data)
        return saved

    def after_step(done: int, stopping: bool) -> None:
        if stopping or done % config.checkpoint_every == 0 or done == config.schedule.last:
            save()

    with save_on_error(engine, lambda: saved, save), ExitStack() as open_ones:
        for thing in (*trackers, steps, work):
            open_ones.callback(thing.close)
        run(
            engine,
            work,
            title=title,
            trackers=trackers,
            log_every=config.log_every,
            quiet=quiet,
            after_step=after_step,
        )
    assert saved is not None  # the last step saves
    run_checkpoints.drop_old(output, config.keep)  # a run killed after its last save has left one
    return run_checkpoints.finish(output, saved)


def open_sources(config: TrainConfig, plugins: Plugins) -> dict[str, Source]:
    """Open the sources that the mixture uses; one with no share at any step is not touched.

    Raises:
        ConfigError: lists every source that cannot be opened.
    """
    build = ModelBuilder(plugins)
    opened: dict[str, Source] = {}
    errors: list[FieldError] = []
    for name in config.used():
        try:
            opened[name] = build(config.sources[name])
        except (JanusError, OSError) as error:
            told = [error for error in getattr(error, "errors", ()) if isinstance(error, FieldError)]
            errors += told or [FieldError(f"sources.{name}", str(error), "")]
    if errors:
        raise config_error(errors)
    return opened


def check_length(config: TrainConfig, model: JanusModel) -> None:
    """Check that packed rows fit into the backbone's context.

    Raises:
        ConfigError: they are longer.
    """
    if config.length is not None and config.length > model.backbone.context:
        raise ConfigError(
            f"length: rows of {config.length} positions; the backbone's context is {model.backbone.context}:"
            f" set length={model.backbone.context} or less."
        )


def prepare(
    config: TrainConfig, sources: Mapping[str, Source], model: JanusModel, processor: Processor
) -> BatchBuilder:
    """Say how a step's samples become tensors for this model.

    Raises:
        ConfigError: packed rows are longer than the backbone's context, or the chat template writes something
            else in training than where the model is asked.
        PromptError: the context holds no image.
    """
    check_prompts(processor)
    check_context(processor)
    check_length(config, model)
    return BatchBuilder(
        mixture=Mixture(sources, config.phases(), config.batch, config.seed),
        sequence=lambda sample, drop: processor.sequence(
            sample, supervise=config.supervise, condition_dropout=drop, check_length=False
        ),
        image_tokens=model.generation.num_tokens,
        pad=processor.pad_id,
        length=config.length,
        longest=model.backbone.context,
        policy=config.bad_samples,
        accumulate=config.accumulate,
        condition_dropout=config.condition_dropout,
    )


def janus_losses(model: JanusModel, work: StepBatch, device: torch.device | str) -> Iterator[Loss]:
    """Yield the loss of each batch of a step: its share of the mean over all supervised positions.

    Words and codes weigh the same (the papers weigh no task). A path with several named losses adds
    them at each position.
    """
    counts: dict[str, float] = {"tokens": sum(work.tokens.values()), "supervised": work.supervised}
    counts |= {f"tokens/{name}": count for name, count in work.tokens.items()}
    counts |= work.bad_sample_counts()
    for batch in work.batches:
        output = model(batch.to(device))
        total = torch.stack([loss.sum() for loss in output.losses.values()]).sum()
        means = {f"loss/{name}": (loss.detach().sum(), loss.numel()) for name, loss in output.losses.items()}
        yield Loss(total / work.supervised, {**means, **_by_source(output, batch.sources)}, counts)
        counts = {}  # they are the whole step's


def _by_source(output: Output, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum the losses of each source, and count the positions they were taken at."""
    first = next(iter(output.losses.values()))
    sums, weights = (torch.zeros(len(names), device=first.device) for _ in range(2))
    for name, loss in output.losses.items():
        sums.index_add_(0, output.sources[name], loss.detach())
        weights.index_add_(0, output.sources[name], torch.ones_like(loss))
    return {f"source/{name}": (sums[i], weights[i]) for i, name in enumerate(names)}


def autocast_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """Return what to compute in where that is not float32. Weights are float32 throughout."""
    half = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else None


def _checkpoint(output: Path, config: TrainConfig, resume: bool) -> tuple[Path | None, list[Change]]:
    """Return the checkpoint to go on from, verified, and the settings that have changed since."""
    found = run_checkpoints.newest_checkpoint(output)
    if resume and found is None:
        raise TrainingError(
            f"there is nothing to resume: {output}/checkpoints holds none. Leave --resume out."
        )
    if found is not None and not resume:
        raise TrainingError(
            f"{output} holds a run already ({found.name}): go on with --resume, or choose another"
            " output=FOLDER."
        )
    if found is None:
        return None, []
    run_checkpoints.check_checkpoint(found, config)
    return found, run_checkpoints.check_same_run(found, config)
