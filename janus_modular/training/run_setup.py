"""What a run is made of before its first step: its data, their batches, and where it continues."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.checkpoints.native import plugins_of
from janus_modular.config import component_specs
from janus_modular.config.errors import FieldError, config_error
from janus_modular.errors import ConfigError, JanusError, TrainingError
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.model.checks import check_packing, check_shapes
from janus_modular.model.model import JanusModel
from janus_modular.objectives import Objective, ReadsExamples
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.plugins.lock import check_lock
from janus_modular.processing.processor import Processor
from janus_modular.processing.prompt_check import check_context, check_prompts
from janus_modular.protocols import Source
from janus_modular.suggest import did_you_mean
from janus_modular.training.example_batches import ExampleBuilder
from janus_modular.training.image_codes import ImageCodes
from janus_modular.training.mixture import Mixture
from janus_modular.training.objective import (
    build_objective,
    check_settings,
    compares_examples,
    own_optimizers,
    reads_examples,
    trained_modules,
)
from janus_modular.training.optimizer import OptimizerList, build_optimizers
from janus_modular.training.parallel import check_components
from janus_modular.training.processes import Processes
from janus_modular.training.resume import Change, check_checkpoint, check_same_run
from janus_modular.training.run_folder import incomplete_checkpoints, newest_checkpoint
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import BatchBuilder
from janus_modular.training.step_builder import StepBuilder
from janus_modular.training.token_mixture import mixed_by_tokens
from janus_modular.training.trainable import check_wrapped, set_trainable
from janus_modular.training.validation import Validation, check_samplers

log = logging.getLogger(__name__)


def open_sources(
    config: TrainConfig, plugins: Plugins, replacements: Mapping[str, Source] | None = None
) -> dict[str, Source]:
    """Open the sources that the mixture uses; a source with no share at any step is not opened.

    ``replacements`` are used in place of the config's sources of the same names.

    Raises:
        ConfigError: lists every source that cannot be opened, or every replacement of an unknown name.
    """
    ready = replacements or {}
    if unknown := [name for name in ready if name not in config.sources]:
        raise config_error(
            [
                FieldError(
                    f"sources.{name}",
                    "a source object of this name was passed, which the config lacks",
                    f"one of {', '.join(config.sources) or 'none'}",
                    did_you_mean(name, config.sources),
                )
                for name in unknown
            ]
        )
    specs = {name: config.sources[name] for name in config.used_sources() if name not in ready}
    opened = _opened(specs, "sources", plugins)
    return {name: ready[name] if name in ready else opened[name] for name in config.used_sources()}


def open_validation(
    config: TrainConfig,
    builder: StepBuilder,
    plugins: Plugins,
    objective: Objective,
    assembly: ModelAssembly,
) -> Validation | None:
    """Open the sources that are held out, and prepare their samples; None if the run is not validated.

    `check_training` has checked the samplers before.

    Raises:
        ConfigError: a source or an image of a question cannot be opened, or a prompt is too long.
        DataError: a sample cannot be used.
    """
    if not config.validation.every:
        return None
    sources = _opened(config.validation.sources, "validation.sources", plugins)
    validation = Validation(config, sources, builder, plugins, objective)
    validation.check_prompts(assembly)
    return validation


def _opened(specs: Mapping[str, ComponentSpec], path: str, plugins: Plugins) -> dict[str, Source]:
    build = ModelBuilder(plugins)
    opened: dict[str, Source] = {}
    errors: list[FieldError] = []
    for name, spec in specs.items():
        try:
            opened[name] = build(spec)
        except (JanusError, OSError) as error:
            details = getattr(error, "errors", ())
            field_errors = [detail for detail in details if isinstance(detail, FieldError)]
            errors += field_errors or [FieldError(f"{path}.{name}", str(error), "")]
    if errors:
        raise config_error(errors)
    return opened


def check_training(
    config: TrainConfig, model: JanusModel, plugins: Plugins
) -> tuple[Objective, OptimizerList]:
    """Check a model on the device ``meta``, and the settings of a run that name parts of it.

    `config validate`, dry runs and runs call this, before weights are read. Returns the objective, and the
    optimizers of what it and the config train.

    Raises:
        ConfigError: a setting names what the model does not have, or has no effect with the objective; or a
            component returns another shape than it declares.
    """
    check_shapes(model, plugins)
    objective = build_objective(config.objective, model, plugins, "meta")
    set_trainable(model, config.learn, objective.trains)
    check_wrapped(config, model)
    check_settings(config, objective)
    check_samplers(config, model, plugins)
    if not reads_examples(objective):
        check_row_length(config, model)
        check_packing(model)
    check_components(model, config.parallel, config.activation_checkpointing, config.compile)
    trained = trained_modules(model, objective)
    return objective, build_optimizers(trained, config.optimizer, own_optimizers(objective))


def check_row_length(config: TrainConfig, model: JanusModel) -> None:
    """Check that packed rows fit into the backbone's context.

    Raises:
        ConfigError: the rows are longer.
    """
    if config.length is not None and config.length > model.backbone.context:
        raise ConfigError(
            f"length: rows of {config.length} positions; the backbone's context is {model.backbone.context}:"
            f" set length={model.backbone.context} or less."
        )


def batch_builder(
    config: TrainConfig,
    sources: Mapping[str, Source],
    model: JanusModel,
    processor: Processor,
    processes: Processes | None = None,
    codes: ImageCodes | None = None,
) -> BatchBuilder:
    """Return the builder of this model's batches, with stored ``codes`` in place of images if there are any.

    Warns of sources and phases that the run stops before.

    Raises:
        ConfigError: packed rows are longer than the backbone's context, or the chat template renders training
            samples differently from prompts.
        PromptError: the context holds no image.
        DataError: the mixture is by tokens, and none of a source's first samples can be used.
    """
    check_prompts(processor)
    check_context(processor)
    check_row_length(config, model)
    for remark in config.unused_before_stop():
        log.warning(remark)
    builder = BatchBuilder(
        mixture=Mixture(sources, config.mixture_phases(), config.batch, config.seed, config.codes.variants),
        sequence=lambda sample, condition_dropout: processor.sequence(
            sample,
            supervise=config.supervise,
            condition_dropout=condition_dropout,
            learn_image_ends=config.learn_image_ends,
            check_length=False,
        ),
        image_tokens=model.generation.num_tokens,
        pad=processor.pad_id,
        length=config.length,
        longest=model.backbone.context,
        policy=config.bad_samples,
        accumulate=config.accumulate,
        condition_dropout=config.condition_dropout,
        rank=processes.rank if processes else 0,
        world=processes.world if processes else 1,
        codes=codes,
    )
    if config.mixture_unit == "samples":
        return builder
    return mixed_by_tokens(
        builder,
        config.mixture_phases(),
        config.schedule.steps,
        workers=config.workers,
        worker_type=config.worker_type,
    )


def step_builder(
    config: TrainConfig,
    sources: Mapping[str, Source],
    assembly: ModelAssembly,
    objective: Objective,
    processes: Processes | None = None,
    codes: ImageCodes | None = None,
) -> StepBuilder:
    """Return the builder of an objective's batches: token sequences, or examples.

    Raises:
        JanusError: as `batch_builder` does; or a setting has no effect on examples.
    """
    check_settings(config, objective)
    processor = assembly.processor
    if not isinstance(objective, ReadsExamples):
        return batch_builder(config, sources, assembly.model, processor, processes, codes)
    for remark in config.unused_before_stop():
        log.warning(remark)
    return ExampleBuilder(
        mixture=Mixture(sources, config.mixture_phases(), config.batch, config.seed),
        example=lambda sample, rng: objective.example(sample, processor, rng),
        compares=compares_examples(objective),
        policy=config.bad_samples,
        accumulate=config.accumulate,
        rank=processes.rank if processes else 0,
        world=processes.world if processes else 1,
    )


def components_of(
    config: TrainConfig, assembly: ModelAssembly, plugins: Plugins
) -> list[dict[str, str | None]]:
    """Return the components that a run's steps depend on: those of the model, its objective and sources."""
    used = {"objective": config.objective, "sources": config.sources}
    return plugins_of(assembly, plugins) + plugins.required(spec for _, spec in component_specs(used))


def autocast_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype to compute in, or None for float32. Weights are always float32."""
    use_bfloat16 = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if use_bfloat16 else None


def find_checkpoint(
    output: Path,
    config: TrainConfig,
    resume: bool,
    processes: Processes | None = None,
    plugins: Plugins | None = None,
) -> tuple[Path | None, list[Change]]:
    """Return the verified checkpoint to resume from, and the settings that have changed since.

    All of several ``processes`` call this, and get the same result.

    Raises:
        TrainingError: there is nothing to resume, or a run that is not to be resumed; or the checkpoint is
            damaged, or of another run.
        PluginError: the checkpoint or the run's model has locked its plugins, and they have changed.
    """
    processes = processes or Processes()
    checkpoint = processes.on_first(lambda: _checkpoint_to_resume(output, resume))
    if checkpoint is None:
        return None, []
    for folder in (checkpoint, output / "model"):
        processes.on_first(partial(check_lock, folder, plugins or default_plugins()))
    processes.together(lambda: check_checkpoint(checkpoint, config, processes))
    return checkpoint, processes.on_first(lambda: check_same_run(checkpoint, config))


def _checkpoint_to_resume(output: Path, resume: bool) -> Path | None:
    checkpoint = newest_checkpoint(output)
    if resume and checkpoint is None:
        incomplete = "".join(f" {note}." for note in incomplete_checkpoints(output))
        raise TrainingError(
            f"there is nothing to resume: {output}/checkpoints holds no complete checkpoint.{incomplete}"
            " Leave --resume out to start anew."
        )
    if checkpoint is not None and not resume:
        raise TrainingError(
            f"{output} holds a run already ({checkpoint.name}): continue it with --resume, or choose another"
            " output=FOLDER."
        )
    return checkpoint
