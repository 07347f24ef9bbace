"""The native checkpoint format: config.json, safetensors, tokenizer, processor settings and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_modular.arguments import dtype_name
from janus_modular.checkpoints.assembly import ModelAssembly, Provenance
from janus_modular.checkpoints.model_card import model_card
from janus_modular.config import component_specs, module_path, resolve, to_plain
from janus_modular.config import load as load_config
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckpointError, JanusError, PluginError
from janus_modular.foreign import foreign_errors, name_in_errors, read_json
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import MAX_TENSORS, build_model
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.plugins.lock import check_lock
from janus_modular.weights.checksums import write_checksums
from janus_modular.weights.loading import load_weights
from janus_modular.weights.pretrained import PretrainedReport
from janus_modular.weights.writing import (
    DTYPES,
    MAX_SHARD_SIZE,
    replace_checkpoint,
    write_json,
    write_weights,
)

MODEL_TYPE = "janus-modular"
FORMAT = 1
"""Version of the format; a newer one is an error."""

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes in which a model may compute and be written, by name."""

RECORD = {"format": int, "model": dict, "plugins": list, "pretrained": list}
"""The required keys of a native config.json."""


def save(
    assembly: ModelAssembly,
    folder: str | Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    plugins: Plugins | None = None,
) -> None:
    """Write a self-contained checkpoint, which needs only the plugins that it names.

    It is written under a temporary path and renamed: if the disk is full, the old files stay, and nothing is
    partially written.

    Args:
        assembly: the model; it may be on the meta device where ``tensors`` are given.
        folder: to write, or to replace.
        tensors: the weights by their native names; the model's own if None.
        training: a record of the training for config.json and the model card.
        dtype: floating-point weights are cast to it; None keeps theirs.
        max_shard_size: the largest weight file, in bytes.
        plugins: the plugins of the components; None: all installed plugins.

    Raises:
        CheckpointError: ``folder`` holds something else than a native checkpoint, or cannot be written.
    """
    folder = Path(folder)
    check_rebuilds(assembly, plugins, tensors=tensors)
    tensors = stored_tensors(assembly.model) if tensors is None else tensors
    with replace_checkpoint(folder, replaces=MODEL_TYPE, plugins=plugins) as temporary:
        write_description(assembly, temporary, name=folder.name, training=training, plugins=plugins)
        hashes = write_weights(temporary, tensors.items(), dtype=dtype, max_shard_size=max_shard_size)
        write_checksums(temporary, hashes)


def write_description(
    assembly: ModelAssembly,
    folder: Path,
    *,
    name: str,
    training: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
) -> None:
    """Write all of a checkpoint but its weights; the model may be on the meta device."""
    record = make_record(assembly, training, plugins or default_plugins())
    assembly.processor.save(folder)
    write_json(folder / "config.json", record)
    (folder / "README.md").write_text(model_card(assembly.model, name, record), "utf-8")


def make_record(
    assembly: ModelAssembly, training: Mapping[str, Any] | None, plugins: Plugins
) -> dict[str, Any]:
    """Return the content of config.json."""
    from janus_modular import __version__

    return {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "written_by": __version__,
        "model": to_plain(rebuildable_config(assembly.model)),
        "plugins": plugins_of(assembly, plugins),
        "pretrained": [asdict(report) for report in assembly.provenance.pretrained],
        "training": dict(training or {}),
    }


def check_rebuilds(
    assembly: ModelAssembly,
    plugins: Plugins | None = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Check that the config which is saved with a model builds a model that takes the saved tensors.

    The config goes through JSON and back, and becomes a model on the meta device; names, shapes and kinds of
    dtype are compared. ``tensors`` as in `save`.

    Raises:
        CheckpointError: the checkpoint could not be opened; says which names, dtypes or shapes would not fit.
    """
    plugins = plugins or default_plugins()
    subject = "the checkpoint that would be written cannot be opened again, so nothing is written: it"
    record = make_record(assembly, None, plugins)
    written = stored_tensors(assembly.model) if tensors is None else tensors
    try:
        plain = json.loads(json.dumps(record))
        rebuilt, _ = build_recorded(Path(subject), plain, (), plugins, tensors=len(written))
    except (JanusError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{subject} has a config that builds no model: {error}\nA component's `config` must hold what the"
            " component was built from, as plain values"
        ) from error
    result = load_weights(
        rebuilt,
        (
            (name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
            for name, tensor in written.items()
        ),
        device="meta",
    )
    if tensors is None:  # a weight that the rebuilt model ties would be saved, and read, twice
        result.unexpected += sorted(written.keys() - stored_tensors(rebuilt).keys() - {*result.unexpected})
    result.mismatched += [
        f"{name}: {tensor.dtype} cannot be stored"
        for name, tensor in written.items()
        if tensor.dtype not in DTYPES
    ]
    result.check(subject, list(assembly.model.components()))


def plugins_of(assembly: ModelAssembly, plugins: Plugins) -> list[dict[str, str | None]]:
    """Return the plugins of a model's components and samplers, as checkpoints and bundles record them.

    Saving needs no sampler: a sampler that is not installed stays recorded as the model's own checkpoint
    has it, and an unknown one is left out; sampling with it is an error.
    """
    model, recorded = assembly.model, assembly.provenance.plugins
    plugins = plugins.as_recorded(recorded)
    needed = plugins.required(spec for _, spec in component_specs(model.config))
    for slot, name in (("text_samplers", model.text_sampler), ("image_samplers", model.image_sampler)):
        try:
            needed += plugins.required([ComponentSpec(slot, name, None)])
        except PluginError:
            key = (slot, name.rpartition(":")[2])
            needed += [dict(plugin) for plugin in recorded if (plugin["slot"], plugin["name"]) == key]
    return needed


def stored_tensors(model: JanusModel) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint holds, by name; tied weights once."""
    first_names: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if first_names.setdefault(id(tensor), name) == name
    }


def rebuildable_config(model: JanusModel) -> ModelConfig:
    """Return the model's config with every component as it was built, so that no other file is needed.

    A component's module may say in its ``config`` what it was built from.
    """
    config = deepcopy(model.config)
    modules: Mapping[str, Any] = model.components()
    for path, spec in component_specs(config):
        module = modules[module_path(path)]
        if isinstance(getattr(module, "config", None), type(spec.config)):
            spec.config = deepcopy(module.config)
        spec.config = replace(spec.config, pretrained=None, revision=None)
    config.processor = replace(config.processor, tokenizer=None, revision=None)
    return config


def read_record(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        CheckpointError: config.json is missing or not JSON, or ``folder`` is a file.
    """
    path = folder / "config.json"
    with foreign_errors(path, CheckpointError):
        if folder.is_file():
            raise CheckpointError(
                f"{folder} is a file; expected a model: the folder of a checkpoint or a bundle, or a hub id."
            )
        if not path.exists():
            trained = folder / "model"  # of a training run's folder
            hint = f" The model of this run is {trained}." if (trained / "config.json").exists() else ""
            raise CheckpointError(
                f"{folder} is no checkpoint: it has no config.json; expected the folder of a"
                f" checkpoint, or of a bundle (manifest.json).{hint}"
            )
    return read_json(path, CheckpointError)


def build_recorded(
    folder: Path, record: Mapping[str, Any], overrides: Sequence[str], plugins: Plugins, *, tensors: int
) -> tuple[JanusModel, Provenance]:
    """Build the model of a native config.json on the meta device; ``tensors`` counts the stored weights.

    Raises:
        JanusError: of any class, naming the file: the record is damaged, of a newer format, or describes a
            model that cannot be built here or has more weights than there are.
    """
    check_record(folder, record)
    check_lock(folder, plugins)
    with name_in_errors(folder / "config.json"), foreign_errors(folder / "config.json", CheckpointError):
        plugins.check_required(record["plugins"])
        config = recorded_config(record, overrides, plugins)
        reports = [PretrainedReport(**report) for report in record["pretrained"]]
        model = build_model(config, plugins, on_meta=True, max_tensors=max_tensors(tensors))
    return model, Provenance(reports, record["plugins"])


def max_tensors(stored: int) -> int:
    """Return the most weights of a model whose files hold ``stored``: tied, fused and split ones differ."""
    return min(MAX_TENSORS, 10 * stored + 10_000)


def check_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Check the form of a native config.json; its ``model`` is checked later, key by key.

    Raises:
        CheckpointError: a key is missing or of another type, or the format is newer than this version reads.
    """
    path = folder / "config.json"
    for key, expected in {**RECORD, "training": dict}.items():
        if key not in record and key in RECORD:
            raise CheckpointError(f"{path} lacks {key!r}. Fetch it again.")
        if key in record and type(record[key]) is not expected:
            raise CheckpointError(
                f"{path}: {key} is a {type(record[key]).__name__}, expected a {expected.__name__}."
                " Fetch it again."
            )
    if record["format"] < 1:
        raise CheckpointError(f"{path}: format is {record['format']}, expected 1 or more. Fetch it again.")
    if record["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} is of format {record['format']}, written by janus-modular {record.get('written_by')};"
            f" this version reads up to format {FORMAT}: pip install --upgrade janus-modular"
        )
    for item in record["plugins"]:
        texts = isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("slot", "name"))
        if not texts or not all(isinstance(value, str | None) for value in item.values()):
            raise CheckpointError(f"{path}: plugins has {item!r:.200}, expected slot, name and more as text.")


def recorded_config(record: Mapping[str, Any], overrides: Sequence[str], plugins: Plugins) -> ModelConfig:
    """Resolve a record's model config; a name that several plugins share here means the recorded one."""
    recorded = plugins.as_recorded(record["plugins"])
    config = resolve(load_config(record["model"], overrides, recorded), ModelConfig, recorded)
    for _, spec in component_specs(config):
        spec.name = recorded.full_name(spec.slot, spec.name)
    return config


def working_dtype(
    dtype: torch.dtype | str, device: torch.device | str, weights: Mapping[str, Tensor]
) -> torch.dtype:
    """Return the dtype to compute in. ``auto``: float32 on a CPU, elsewhere that of the stored weights.

    Half precision is hundreds of times slower in a CPU's convolutions, and nothing is lost in float32.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if (name := dtype_name(dtype)) not in COMPUTE_DTYPES:
            raise CheckpointError(
                f"there is no dtype '{dtype}' that a model computes in: expected auto,"
                f" {', '.join(COMPUTE_DTYPES)}."
            )
        return COMPUTE_DTYPES[name]
    if torch.device(device).type == "cpu":
        return torch.float32
    names = sorted(weights, key=lambda name: not name.startswith("backbone."))
    stored = next((weights[n].dtype for n in names if weights[n].is_floating_point()), torch.float32)
    if stored not in (*COMPUTE_DTYPES.values(), torch.float64):
        raise CheckpointError(
            f"the weights are stored as {stored}, in which no model computes: expected a dtype of"
            f" {', '.join(COMPUTE_DTYPES)} beside them."
        )
    return stored
