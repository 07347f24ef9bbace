"""Opening a checkpoint of any format: the model, and the processor that speaks its language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_modular.bundles import is_bundle
from janus_modular.checkpoints import native
from janus_modular.checkpoints.from_config import (
    build_processor,
    check_vocabulary,
    grow_vocabulary,
    processor_sizes,
)
from janus_modular.checkpoints.quantized import refuse_quantized
from janus_modular.components import Builder
from janus_modular.config import component_specs, load, module_path, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckpointError, ConfigError
from janus_modular.foreign import foreign_errors, naming
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.protocols import CheckpointFormat
from janus_modular.weights.files import open_weights
from janus_modular.weights.loading import load_weights
from janus_modular.weights.pretrained import resolve_pretrained


@dataclass
class LazyCheckpoint:
    """A checkpoint whose weights have not been read yet."""

    folder: Path
    format_name: str  # registered name, or ``native, format 1``
    model: JanusModel  # blank
    processor: Processor
    tensors: Mapping[str, Tensor]  # by native names; mapped files
    training: Mapping[str, Any] = field(default_factory=dict)  # what is recorded of it


def open_checkpoint(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    overrides: Sequence[str] = (),
    plugins: Plugins | None = None,
) -> tuple[JanusModel, Processor]:
    """Load a checkpoint of any known format: a folder, or a hub id. Needs the model's memory and no more.

    ``overrides`` (``a.b=c``) change the model config that was read, the prompt format for instance:
    ``processor.template=janus``.

    Raises:
        CheckpointError: it is of no known format, damaged, or does not fit its own config.
        PluginError: a plugin that it needs is not here.
    """
    opened = open_lazily(path, overrides=overrides, plugins=plugins)
    model = native.filled(
        opened.model,
        opened.tensors,
        str(opened.folder),
        device=device,
        dtype=native.working_dtype(dtype, device, opened.tensors),
    )
    processor = opened.processor
    check_vocabulary(model, processor)
    grow_vocabulary(model, processor)
    return model, processor


def open_lazily(
    path: str | Path, *, overrides: Sequence[str] = (), plugins: Plugins | None = None
) -> LazyCheckpoint:
    """Open a checkpoint without reading its weights: config, processor, a blank model, lazy tensors."""
    plugins = plugins or default_plugins()
    folder = resolve_pretrained(str(path))
    refuse_bundle(folder)
    record = native.read_record(folder)
    refuse_quantized(folder)
    if record.get("model_type") == native.MODEL_TYPE:
        if changes := [one for one in overrides if one.startswith("processor")]:
            raise ConfigError(
                f"{changes[0]}: a native checkpoint's processor is in {folder / 'processor.json'}."
            )
        weights = open_weights(folder)
        model = native.described(folder, record, overrides, plugins, tensors=len(weights))
        processor = fitted(Processor.load(folder), model, folder, changed=bool(overrides))
        format_name = f"native, format {record['format']}"
        return LazyCheckpoint(folder, format_name, model, processor, weights, record.get("training", {}))
    with naming(folder), foreign_errors(folder, CheckpointError):
        name, checkpoint_format = detect_format(folder, record, plugins)
        config = resolve(
            load(checkpoint_format.read_config(folder), overrides, plugins), ModelConfig, plugins
        )
        weights = open_weights(folder)
        model = native.blank(config, plugins, most_tensors=native.most_weights(len(weights)))
        processor = build_processor(model, config.processor.tokenizer)
        model.config.processor = replace(config.processor, suppress_tokens=list(processor.suppress_tokens))
        return LazyCheckpoint(folder, name, model, processor, dict(checkpoint_format.to_native(weights)))


def check_weights(opened: LazyCheckpoint) -> None:
    """Hold weights to the model that they are for, without reading them: names, shapes and types of numbers.

    What only numbers tell passes: whether two copies of a tied weight are equal.

    Raises:
        CheckpointError: `open_checkpoint` would refuse them.
        ConfigError: the tokenizer has more tokens than the weights have rows.
    """
    shapes = ((name, tensor.to("meta")) for name, tensor in opened.tensors.items())
    outcome = load_weights(opened.model, shapes, device="meta")
    outcome.check(str(opened.folder), [module_path(path) for path, _ in component_specs(opened.model.config)])
    check_vocabulary(opened.model, opened.processor)


def fitted(processor: Processor, model: JanusModel, folder: Path, *, changed: bool) -> Processor:
    """Hold a saved processor to the model that is built beside it, which decides sizes and positions.

    ``changed``: the config was overridden, so the processor follows; otherwise the two files must agree.

    Raises:
        CheckpointError: processor.json has other sizes than config.json makes.
    """
    for name, value in processor_sizes(model).items():
        saved = getattr(processor, name)
        if saved != value and not changed:
            raise CheckpointError(
                f"{folder / 'processor.json'}: {name} is {saved}; expected {value}, which the model of"
                " config.json has. The two are of different checkpoints: fetch the folder again"
            )
        setattr(processor, name, value)
    return processor


def refuse_bundle(folder: Path) -> None:
    """Say of a bundle that it is one: graphs cannot be opened as the checkpoint that they were made of.

    Raises:
        CheckpointError: the folder is a bundle.
    """
    if is_bundle(folder):
        raise CheckpointError(
            f"{folder} is a bundle, expected the checkpoint that it was exported from. What is in it, and of"
            f" which checkpoint: janus-modular inspect {folder}"
        )


def detect_format(folder: Path, record: Mapping[str, Any], plugins: Plugins) -> tuple[str, CheckpointFormat]:
    """Return the format that a folder's config.json is of, after its registered name.

    Raises:
        CheckpointError: none of those that are known here.
    """
    for name in plugins.names("formats"):
        checkpoint_format = build_format(name, plugins)
        if checkpoint_format.detect(record):
            return name, checkpoint_format
    raise CheckpointError(
        f"{folder} is of no known format: its config.json says model_type {record.get('model_type')!r}.\n"
        f"Known: native, {', '.join(plugins.names('formats'))}"
    )


def build_format(name: str, plugins: Plugins) -> CheckpointFormat:
    """Build a registered format."""
    entry = plugins.entry("formats", name)
    return entry.make(entry.config(), build=Builder(plugins))
