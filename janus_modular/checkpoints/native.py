"""Our own checkpoints: config.json, safetensors, tokenizer, processor settings and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from janus_modular.checkpoints.model_card import model_card
from janus_modular.config import component_specs, module_path, resolve, to_plain
from janus_modular.config import load as load_config
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckpointError, JanusError, PluginError
from janus_modular.foreign import foreign_errors, naming, read_json
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import MAX_TENSORS, build_model
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.weights.checksums import write_checksums
from janus_modular.weights.files import Weights, open_weights
from janus_modular.weights.loading import load_weights, move_buffers, parameters_on_meta
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
"""Version of the format; one that is newer than ours is refused."""


COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a model may compute in, and be written in, by name."""

RECORD = {"format": int, "model": dict, "plugins": list, "pretrained": list}
"""What a config.json of ours holds at least."""


class Saves(Protocol):
    """What can write itself beside the weights: the processor."""

    def save(self, folder: Path) -> None:
        """Write its files into a folder."""
        ...


def save(
    model: JanusModel,
    processor: Saves,
    folder: str | Path,
    *,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    plugins: Plugins | None = None,
) -> None:
    """Write a checkpoint that needs nothing else, beside the plugins that it names.

    It is written aside and renamed: a full disk leaves what was there before, and nothing half-written.
    ``training`` goes into config.json and the model card; ``dtype`` casts what is written.

    Raises:
        CheckpointError: ``folder`` holds something that is no checkpoint of ours, or cannot be written.
    """
    folder = Path(folder)
    check_rebuilds(model, plugins)
    with replace_checkpoint(folder, replaces=MODEL_TYPE) as aside:
        write_description(model, processor, aside, name=folder.name, training=training, plugins=plugins)
        hashes = write_weights(
            aside, stored_tensors(model).items(), dtype=dtype, max_shard_size=max_shard_size
        )
        write_checksums(aside, hashes)


def write_description(
    model: JanusModel,
    processor: Saves,
    folder: Path,
    *,
    name: str,
    training: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
) -> None:
    """Write all of a checkpoint but its weights; a model on the meta device will do."""
    record = record_of(model, training, plugins or default_plugins())
    processor.save(folder)
    write_json(folder / "config.json", record)
    (folder / "README.md").write_text(model_card(model, name, record), "utf-8")


def record_of(model: JanusModel, training: Mapping[str, Any] | None, plugins: Plugins) -> dict[str, Any]:
    """Return what config.json says of a model."""
    from janus_modular import __version__

    return {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "written_by": __version__,
        "model": to_plain(rebuildable(model)),
        "plugins": plugins_of(model, plugins),
        "pretrained": [asdict(report) for report in model.pretrained],
        "training": dict(training or {}),
    }


def check_rebuilds(
    model: JanusModel, plugins: Plugins | None = None, *, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Prove that the config which is saved with a model builds one that takes the tensors saved with it.

    The config goes through JSON and back, and becomes a model on the meta device; names, shapes and kinds of
    numbers are compared. ``tensors`` stand in for the model's own, where it has none.

    Raises:
        CheckpointError: the checkpoint could not be opened; says which names, dtypes or shapes would not fit.
    """
    plugins = plugins or default_plugins()
    what = "the checkpoint that would be written cannot be opened again, so nothing is written: it"
    record = record_of(model, None, plugins)
    written = stored_tensors(model) if tensors is None else tensors
    try:
        again = described(Path(what), json.loads(json.dumps(record)), (), plugins, tensors=len(written))
    except (JanusError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} has a config that builds no model: {error}\nA component's `config` must hold what the"
            " component was built from, as plain values"
        ) from error
    outcome = load_weights(
        again, ((name, tensor.to("meta")) for name, tensor in written.items()), device="meta"
    )
    if tensors is None:  # a weight that the rebuilt model ties would be saved, and read, twice
        outcome.unexpected += sorted(written.keys() - stored_tensors(again).keys() - {*outcome.unexpected})
    outcome.mismatched += [
        f"{name}: {tensor.dtype} cannot be stored"
        for name, tensor in written.items()
        if tensor.dtype not in DTYPES
    ]
    outcome.check(what, [module_path(path) for path, _ in component_specs(model.config)])


def plugins_of(model: JanusModel, plugins: Plugins) -> list[dict[str, str | None]]:
    """Return the plugins of a model's components and samplers, as checkpoints and bundles record them.

    Saving needs no sampler. A sampler that is not installed stays recorded as in the model's own checkpoint;
    an unknown sampler is left out, and is an error once it is used.
    """
    plugins = plugins.as_recorded(model.recorded)
    found = plugins.required(part for _, part in component_specs(model.config))
    for slot, name in (("text_samplers", model.text_sampler), ("image_samplers", model.image_sampler)):
        try:
            found += plugins.required([ComponentSpec(slot, name, None)])
        except PluginError:
            known = (slot, name.rpartition(":")[2])
            found += [dict(one) for one in model.recorded if (one["slot"], one["name"]) == known]
    return found


def stored_tensors(model: JanusModel) -> dict[str, Tensor]:
    """Name the tensors that a checkpoint holds: of tied weights, one."""
    seen: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if seen.setdefault(id(tensor), name) == name
    }


def rebuildable(model: JanusModel) -> ModelConfig:
    """Return the model's config with every part as it was built, so that no other file is needed.

    A part's module is found under the part's path in the config, and says what it is in ``config``.
    """
    config = deepcopy(model.config)
    for path, part in component_specs(config):
        module = model.get_submodule(module_path(path))
        if isinstance(getattr(module, "config", None), type(part.config)):
            part.config = deepcopy(module.config)
        part.config = replace(part.config, pretrained=None, revision=None)
    config.processor = replace(config.processor, tokenizer=None, revision=None)
    return config


def read_record(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        CheckpointError: there is none, it is not JSON, or ``folder`` is a file.
    """
    path = folder / "config.json"
    with foreign_errors(path, CheckpointError):
        if folder.is_file():
            raise CheckpointError(
                f"{folder} is a file; expected a model: the folder of a checkpoint or a bundle, or a hub id."
            )
        if not path.exists():
            raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.")
    return read_json(path, CheckpointError)


def load(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    overrides: Sequence[str] = (),
    plugins: Plugins | None = None,
) -> JanusModel:
    """Load the model of a checkpoint of ours, one tensor at a time.

    ``overrides``: ``a.b=c``, as on the command line, applied to the model config that is stored.

    Raises:
        CheckpointError: it is damaged, of a newer format, or its weights do not fit its config.
        PluginError: a plugin that it needs is not here.
    """
    plugins = plugins or default_plugins()
    weights = open_weights(folder)
    model = described(folder, read_record(folder), overrides, plugins, tensors=len(weights))
    return filled(model, weights, str(folder), device=device, dtype=working_dtype(dtype, device, weights))


def described(
    folder: Path, record: Mapping[str, Any], overrides: Sequence[str], plugins: Plugins, *, tensors: int
) -> JanusModel:
    """Build the blank model that a config.json of ours describes; its weights are ``tensors`` in number.

    Raises:
        JanusError: of any class, its text names the file: the record is damaged, of a newer format, or
            describes a model that cannot be built here or has more weights than there are.
    """
    check_record(folder, record)
    with naming(folder / "config.json"), foreign_errors(folder / "config.json", CheckpointError):
        plugins.check_required(record["plugins"])
        config = recorded_config(record, overrides, plugins)
        reports = [PretrainedReport(**report) for report in record["pretrained"]]
        model = blank(config, plugins, most_tensors=most_weights(tensors))
    model.pretrained, model.recorded = reports, record["plugins"]
    return model


def most_weights(stored: int) -> int:
    """Return the most weights of a model whose files hold ``stored``: tied, fused and split ones differ."""
    return min(MAX_TENSORS, 10 * stored + 10_000)


def check_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Check the form of a config.json of ours, whose ``model`` is checked later, key by key.

    Raises:
        CheckpointError: a key is missing or of another type, or the format is newer than ours.
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
    for need in record["plugins"]:
        texts = isinstance(need, dict) and all(isinstance(need.get(key), str) for key in ("slot", "name"))
        if not texts or not all(isinstance(value, str | None) for value in need.values()):
            raise CheckpointError(f"{path}: plugins has {need!r:.200}, expected slot, name and more as text.")


def recorded_config(record: Mapping[str, Any], overrides: Sequence[str], plugins: Plugins) -> ModelConfig:
    """Resolve a record's model config; a name that several plugins share here means the recorded one."""
    then = plugins.as_recorded(record["plugins"])
    config = resolve(load_config(record["model"], overrides, then), ModelConfig, then)
    for _, part in component_specs(config):
        part.name = then.full_name(part.slot, part.name)
    return config


def blank(
    config: ModelConfig,
    plugins: Plugins | None = None,
    *,
    root: str = "",
    most_tensors: int = MAX_TENSORS,
) -> JanusModel:
    """Build a model whose parameters take no memory; ``root`` as in `build_model`.

    Raises:
        ConfigError: a part cannot be built, or there are more than ``most_tensors`` weights.
    """
    with parameters_on_meta():
        return build_model(config, plugins, weights=False, root=root, most_tensors=most_tensors)


def filled(
    model: JanusModel,
    tensors: Mapping[str, Tensor],
    what: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> JanusModel:
    """Fill a blank model with native names and tensors; return it, ready for use."""
    outcome = load_weights(model, tensors.items(), device=device, dtype=dtype)
    outcome.check(what, [module_path(path) for path, _ in component_specs(model.config)])
    move_buffers(model, device=device, dtype=dtype)
    return model.eval()


def working_dtype(
    dtype: torch.dtype | str, device: torch.device | str, weights: Weights | Mapping[str, Tensor]
) -> torch.dtype:
    """Choose what to compute in. ``auto``: on a CPU float32, elsewhere what the weights are stored in.

    Half precision is hundreds of times slower in a CPU's convolutions, and nothing is lost in float32.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in COMPUTE_DTYPES:
            raise CheckpointError(
                f"there is no dtype '{dtype}' that a model computes in: expected auto,"
                f" {', '.join(COMPUTE_DTYPES)}."
            )
        return COMPUTE_DTYPES[dtype]
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
