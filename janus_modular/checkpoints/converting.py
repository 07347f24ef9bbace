"""Converts a checkpoint to another format a tensor at a time, without a model in memory."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_modular.checkpoints import native
from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.checkpoints.merging import merge_adapters
from janus_modular.checkpoints.opening import build_format, known_formats, open_lazily
from janus_modular.config import load, resolve, to_plain
from janus_modular.config.overrides import parse
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckpointError
from janus_modular.model.build import build_model
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.tokenizer_files import save_tokenizer
from janus_modular.suggest import did_you_mean
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
    replacements: Mapping[str, Tensor] | None = None,
    plugins: Plugins | None = None,
) -> None:
    """Write the checkpoint ``source`` (a folder, or a hub id) at ``target`` in another format.

    ``dtype`` casts floating-point weights; None keeps them as they are, bit for bit. ``merge`` merges
    adapters into the weights that they adapt. ``replacements`` are written instead of the weights of the same
    names.

    Raises:
        PluginError: an override names a sampler that no plugin registers.
        CheckpointError: the format is unknown, or cannot hold one of the components; the source does not fit
            its own config; or the target cannot be written.
    """
    known = ("native", *(plugins or default_plugins()).names("formats"))
    if format_name not in known:
        raise CheckpointError(
            f"no format is called '{format_name}'. {did_you_mean(format_name, known)}".rstrip()
            + f"\n{known_formats(plugins or default_plugins())}"
        )
    for keys, value in map(parse, overrides):
        if keys in (["text_sampler"], ["image_sampler"]):  # an unknown sampler must not be written
            (plugins or default_plugins()).find(f"{keys[0]}s", str(value))
    checkpoint = open_lazily(source, overrides=overrides, plugins=plugins)
    if Path(target).absolute() == checkpoint.folder.absolute():
        raise CheckpointError(f"{target} is the checkpoint to convert. Choose another folder to write to.")
    if replacements:
        checkpoint.tensors = ChainMap(replacements, checkpoint.tensors)  # type: ignore[arg-type]
    result = load_weights(checkpoint.model, checkpoint.tensors.items(), device="meta")  # names and shapes
    result.check(str(checkpoint.folder), list(checkpoint.model.components()))
    checkpoint = merge_adapters(checkpoint, plugins) if merge else checkpoint
    save_as(
        format_name,
        checkpoint,
        target,
        tensors=checkpoint.tensors,
        training=checkpoint.training,
        dtype=dtype,
        max_shard_size=max_shard_size,
        plugins=plugins,
    )


def save_as(
    format_name: str,
    assembly: ModelAssembly,
    folder: str | Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    plugins: Plugins | None = None,
) -> None:
    """Write a model in a format by its name; arguments as in `native.save`.

    ``training`` is recorded in the native format alone.
    """
    if format_name == "native":
        native.save(
            assembly,
            folder,
            tensors=tensors,
            training=training,
            dtype=dtype,
            max_shard_size=max_shard_size,
            plugins=plugins,
        )
        return
    folder, plugins = Path(folder), plugins or default_plugins()
    tensors = native.stored_tensors(assembly.model) if tensors is None else tensors
    writer = build_format(format_name, plugins)
    config = to_plain(native.rebuildable_config(assembly.model))
    config["processor"]["tokens"] = assembly.processor.tokenizer.names
    with replace_checkpoint(folder, replaces=writer.model_type) as temporary:
        save_tokenizer(assembly.processor.tokenizer, temporary)
        writer.write_config(config, temporary)
        write_weights(temporary, writer.from_native(tensors), dtype=dtype, max_shard_size=max_shard_size)
        written = resolve(load(writer.read_config(temporary), (), plugins), ModelConfig, plugins)
        model = build_model(written, plugins, on_meta=True)
        result = load_weights(model, writer.to_native(open_weights(temporary)), device="meta")
        result.check(f"what would be written at {folder}, opened as the format '{format_name}' is read,")
