"""From one checkpoint format to another, a tensor at a time: no model is ever in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_modular.checkpoints import native
from janus_modular.checkpoints.merging import merge_adapters
from janus_modular.checkpoints.opening import build_format, open_lazily
from janus_modular.config import component_specs, load, module_path, resolve, to_plain
from janus_modular.config.overrides import parse
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckpointError
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.processing.tokenizer_files import save_tokenizer
from janus_modular.suggest import did_you_mean
from janus_modular.weights.checksums import write_checksums
from janus_modular.weights.files import open_weights
from janus_modular.weights.loading import load_weights
from janus_modular.weights.writing import MAX_SHARD_SIZE, replace_checkpoint, write_weights


def convert(
    source: str | Path,
    target: str | Path,
    *,
    format_name: str = "native",
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    merge: bool = False,
    overrides: Sequence[str] = (),
    plugins: Plugins | None = None,
) -> None:
    """Write the checkpoint ``source`` (a folder, or a hub id) at ``target`` in another format.

    ``dtype`` casts floating-point weights; None keeps them as they are, bit for bit. ``merge`` folds adapters
    into the weights that they adapt.

    Raises:
        PluginError: an override names a sampler that no plugin registers.
        CheckpointError: there is no such format, or it has no place for one of the parts; the source does
            not fit its own config; or the target cannot be written.
    """
    known = ("native", *(plugins or default_plugins()).names("formats"))
    if format_name not in known:
        raise CheckpointError(
            f"no format is called '{format_name}'. {did_you_mean(format_name, known)}".rstrip()
            + f"\nKnown: {', '.join(known)}"
        )
    for keys, value in map(parse, overrides):
        if keys in (["text_sampler"], ["image_sampler"]):  # a sampler that nobody has is not written
            (plugins or default_plugins()).find(f"{keys[0]}s", str(value))
    opened = open_lazily(source, overrides=overrides, plugins=plugins)
    if Path(target).absolute() == opened.folder.absolute():
        raise CheckpointError(f"{target} is what is to be converted. Choose another folder to write to.")
    outcome = load_weights(opened.model, opened.tensors.items(), device="meta")  # names and shapes alone
    outcome.check(str(opened.folder), [module_path(path) for path, _ in component_specs(opened.model.config)])
    opened = merge_adapters(opened, plugins) if merge else opened
    save_as(
        format_name,
        opened.model,
        opened.processor,
        target,
        tensors=opened.tensors,
        training=opened.training,
        dtype=dtype,
        max_shard_size=max_shard_size,
        plugins=plugins,
    )


def save_as(
    format_name: str,
    model: JanusModel,
    processor: Processor,
    folder: str | Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    plugins: Plugins | None = None,
) -> None:
    """Write a model in a format by its name.

    ``tensors`` (by native names) stand in for a blank model's; ``training`` is recorded where the format
    has a place for it, which is the native one.
    """
    folder = Path(folder)
    tensors = native.stored_tensors(model) if tensors is None else tensors
    if format_name == "native":
        native.check_rebuilds(model, plugins, tensors=tensors)
        with replace_checkpoint(folder, replaces=native.MODEL_TYPE) as aside:
            native.write_description(
                model, processor, aside, name=folder.name, training=training, plugins=plugins
            )
            hashes = write_weights(aside, tensors.items(), dtype=dtype, max_shard_size=max_shard_size)
            write_checksums(aside, hashes)
        return
    plugins = plugins or default_plugins()
    writer = build_format(format_name, plugins)
    config = to_plain(native.rebuildable(model))
    config["processor"]["tokens"] = processor.tokenizer.names
    with replace_checkpoint(folder, replaces=writer.model_type) as aside:
        save_tokenizer(processor.tokenizer, aside)
        writer.write_config(config, aside)
        write_weights(aside, writer.from_native(tensors), dtype=dtype, max_shard_size=max_shard_size)
        written = native.blank(
            resolve(load(writer.read_config(aside), (), plugins), ModelConfig, plugins), plugins
        )
        outcome = load_weights(written, writer.to_native(open_weights(aside)), device="meta")
        outcome.check(f"what would be written at {folder}, opened as the format '{format_name}' is read,")
