"""Opens checkpoints of any format without reading their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_modular.bundles import is_bundle
from janus_modular.checkpoints import native
from janus_modular.checkpoints.assembly import (
    ModelAssembly,
    Provenance,
    build_processor,
    check_vocabulary,
    grow_vocabulary,
    processor_sizes,
    record_suppressed,
)
from janus_modular.checkpoints.quantized import refuse_quantized
from janus_modular.components import Builder
from janus_modular.config import component_specs, load, module_path, resolve
from janus_modular.config.presets import refuse_config_name
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckpointError, ConfigError
from janus_modular.foreign import foreign_errors, name_in_errors
from janus_modular.model.build import build_model
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.protocols import CheckpointFormat
from janus_modular.weights.files import open_weights
from janus_modular.weights.loading import Copy, load_weights, move_buffers, own_copy
from janus_modular.weights.pretrained import own_tensors, resolve_pretrained


class LazyCheckpoint(ModelAssembly):
    """A checkpoint whose weights are read when they are used; its model is on the meta device."""

    def __init__(
        self,
        model: JanusModel,
        processor: Processor | Callable[[], Processor],
        provenance: Provenance,
        *,
        folder: Path,
        format_name: str,
        tensors: Mapping[str, Tensor],
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Take what was read.

        Args:
            model: on the meta device.
            processor: the processor, or a function that returns it.
            provenance: as recorded in the checkpoint.
            folder: of the checkpoint.
            format_name: a registered name, or ``native, format 1``.
            tensors: the weights by their native names; reading a name maps its file.
            training: the checkpoint's record of its training.
        """
        super().__init__(model, processor, provenance)
        self.folder = folder
        self.format_name = format_name
        self.tensors = tensors
        self.training = training or {}

    def check_weights(self) -> None:
        """Check names, shapes and kinds of dtype of the weights, without reading them.

        Only `load` detects copies of a tied weight that differ.

        Raises:
            CheckpointError: the weights do not fit the model.
            ConfigError: the tokenizer has more tokens than the weights have rows.
        """
        shapes = ((name, tensor.to("meta")) for name, tensor in self.tensors.items())
        result = load_weights(self.model, shapes, device="meta")
        result.check(str(self.folder), list(self.model.components()))
        check_vocabulary(self.model, self.processor)

    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        copy: Copy = own_copy,
    ) -> ModelAssembly:
        """Read the weights into the model, a tensor at a time; return it in eval mode.

        ``copy`` makes a parameter of a stored tensor, say of this process's part of it.

        Raises:
            CheckpointError: the weights do not fit the model.
            ConfigError: the tokenizer has more tokens than the weights have rows.
        """
        chosen = native.working_dtype(dtype, device, self.tensors)
        result = load_weights(self.model, self.tensors.items(), device=device, dtype=chosen, copy=copy)
        result.check(str(self.folder), list(self.model.components()))
        move_buffers(self.model, device=device, dtype=chosen)
        check_vocabulary(self.model, self.processor)
        grow_vocabulary(self.model, self.processor)
        return ModelAssembly(self.model.eval(), self.processor, self.provenance)


def open_lazily(
    path: str | Path, *, overrides: Sequence[str] = (), plugins: Plugins | None = None
) -> LazyCheckpoint:
    """Open a checkpoint (a folder, or a hub id) without reading its weights; ``overrides`` change its config.

    Raises:
        CheckpointError: the format is unknown, or the checkpoint is damaged.
        PluginError: a plugin that it needs is not installed.
    """
    plugins = plugins or default_plugins()
    refuse_config_name(path, error=CheckpointError)
    folder = resolve_pretrained(str(path))
    if is_bundle(folder):
        raise CheckpointError(
            f"{folder} is a bundle, expected the checkpoint that it was exported from. What is in it, and of"
            f" which checkpoint: janus-modular inspect {folder}"
        )
    record = native.read_record(folder)
    refuse_quantized(folder)
    if record.get("model_type") == native.MODEL_TYPE:
        return _open_native(folder, record, overrides, plugins)
    with name_in_errors(folder), foreign_errors(folder, CheckpointError):
        name, checkpoint_format = detect_format(folder, record, plugins)
        raw = checkpoint_format.read_config(folder)
        config = resolve(load(raw, overrides, plugins), ModelConfig, plugins)
        weights = open_weights(folder)
        max_tensors = native.max_tensors(len(weights))
        model = build_model(config, plugins, on_meta=True, max_tensors=max_tensors)
        processor = build_processor(model, config.processor.tokenizer)
        record_suppressed(model, processor)
        tensors = dict(checkpoint_format.to_native(weights))
        tensors |= weights_elsewhere(model, config, tensors)
    return LazyCheckpoint(model, processor, Provenance(), folder=folder, format_name=name, tensors=tensors)


def _open_native(
    folder: Path, record: Mapping[str, Any], overrides: Sequence[str], plugins: Plugins
) -> LazyCheckpoint:
    if changes := [override for override in overrides if override.startswith("processor")]:
        raise ConfigError(f"{changes[0]}: a native checkpoint's processor is in {folder / 'processor.json'}.")
    weights = open_weights(folder)
    model, provenance = native.build_recorded(folder, record, overrides, plugins, tensors=len(weights))
    processor = Processor.load(folder)
    for name, expected in processor_sizes(model).items():
        size = getattr(processor, name)
        if size != expected and not overrides:
            raise CheckpointError(
                f"{folder / 'processor.json'}: {name} is {size}; expected {expected}, which the model of"
                " config.json has. The two are of different checkpoints: fetch the folder again"
            )
        setattr(processor, name, expected)  # the sizes of an overridden config are the model's
    return LazyCheckpoint(
        model,
        processor,
        provenance,
        folder=folder,
        format_name=f"native, format {record['format']}",
        tensors=weights,
        training=record.get("training", {}),
    )


def weights_elsewhere(
    model: JanusModel, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights of components that a checkpoint lacks and whose config names them as ``pretrained``.

    A format whose checkpoints leave a component out names its weights so; overrides may name others.
    """
    components, elsewhere = model.components(), dict[str, Tensor]()
    for path, spec in component_specs(config):
        name = module_path(path)
        if spec.config.pretrained is None or any(own.startswith(f"{name}.") for own in tensors):
            continue
        weights = open_weights(resolve_pretrained(spec.config.pretrained, spec.config.revision))
        elsewhere |= {f"{name}.{own}": tensor for own, tensor in own_tensors(components[name], weights)}
    return elsewhere


def detect_format(folder: Path, record: Mapping[str, Any], plugins: Plugins) -> tuple[str, CheckpointFormat]:
    """Return the registered name and the format of a folder with the config.json ``record``.

    Raises:
        CheckpointError: no registered format detects it.
    """
    for name in plugins.names("formats"):
        checkpoint_format = build_format(name, plugins)
        if checkpoint_format.detect(record):
            return name, checkpoint_format
    raise CheckpointError(
        f"{folder} is of no known format: its config.json says model_type {record.get('model_type')!r}.\n"
        + known_formats(plugins)
    )


def known_formats(plugins: Plugins) -> str:
    """Return the registered formats for a message, and why others of installed plugins cannot be used."""
    known = f"Known: native, {', '.join(plugins.names('formats'))}"
    return "\n".join([known, *plugins.unusable("formats")])


def build_format(name: str, plugins: Plugins) -> CheckpointFormat:
    """Build a registered checkpoint format."""
    entry = plugins.entry("formats", name)
    return entry.make(entry.config(), build=Builder(plugins))
