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

from janus_modular.assemble import assemble
from janus_modular.checkpoints.checksums import write_checksums
from janus_modular.checkpoints.filling import fill, parameters_on_meta, settle
from janus_modular.checkpoints.model_card import model_card
from janus_modular.checkpoints.pretrained import PretrainedReport
from janus_modular.checkpoints.weights import Weights, open_weights
from janus_modular.checkpoints.writing import DTYPES, MAX_SHARD_SIZE, write_json, write_weights, written_aside
from janus_modular.config import load as load_config
from janus_modular.config import module_path, parts_in, resolve, to_plain
from janus_modular.errors import CheckpointError, JanusError, PluginError
from janus_modular.interfaces import Part
from janus_modular.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.schema import ModelConfig

MODEL_TYPE = "janus-modular"
FORMAT = 1
"""Version of the layout; one that is newer than ours is refused."""


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
    with written_aside(folder, replaces=MODEL_TYPE) as aside:
        write_description(model, processor, aside, name=folder.name, training=training, plugins=plugins)
        hashes = write_weights(aside, stored(model).items(), dtype=dtype, max_shard_size=max_shard_size)
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
    try:
        again = described(Path(what), json.loads(json.dumps(record)), (), plugins)
    except (JanusError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} has a config that builds no model: {error}\nA component's `config` must hold what the"
            " component was built from, as plain values"
        ) from error
    written = stored(model) if tensors is None else tensors
    outcome = fill(again, ((name, tensor.to("meta")) for name, tensor in written.items()), device="meta")
    if tensors is None:  # a weight that the rebuilt model ties would be saved, and read, twice
        outcome.unexpected += sorted(written.keys() - stored(again).keys() - {*outcome.unexpected})
    outcome.misshapen += [
        f"{name}: {tensor.dtype} cannot be stored"
        for name, tensor in written.items()
        if tensor.dtype not in DTYPES
    ]
    outcome.check(what, [module_path(path) for path, _ in parts_in(model.config)])


def plugins_of(model: JanusModel, plugins: Plugins) -> list[dict[str, str | None]]:
    """Say which plugins a model's parts and its sampling loops are of, as checkpoints and bundles record it.

    Saving needs no loop. One that is not here stays recorded as the model's own checkpoint has it; one that
    nobody knows is left out, and is an error to whoever asks for it.
    """
    plugins = plugins.as_recorded(model.recorded)
    found = plugins.needed(part for _, part in parts_in(model.config))
    for name in dict.fromkeys([model.config.text_loop, model.generation.sampling_loop]):
        try:
            found += plugins.needed([Part("sampling_loops", name, None)])
        except PluginError:
            known = ("sampling_loops", name.rpartition(":")[2])
            found += [dict(one) for one in model.recorded if (one["slot"], one["name"]) == known]
    return found


def stored(model: JanusModel) -> dict[str, Tensor]:
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
    for path, part in parts_in(config):
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
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.") from error
    except NotADirectoryError as error:
        raise CheckpointError(
            f"{folder} is a file; expected a model: the folder of a checkpoint or a bundle, or a hub id."
        ) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch it again.") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds a {type(record).__name__}, expected a JSON object.")
    return record


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
    model = described(folder, read_record(folder), overrides, plugins)
    weights = open_weights(folder)
    return filled(model, weights, str(folder), device=device, dtype=working_dtype(dtype, device, weights))


def described(
    folder: Path, record: Mapping[str, Any], overrides: Sequence[str], plugins: Plugins
) -> JanusModel:
    """Build the blank model that a config.json of ours describes."""
    if record.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{folder} is of format {record['format']}, written by janus-modular {record.get('written_by')};"
            f" this version reads up to format {FORMAT}: pip install --upgrade janus-modular"
        )
    try:
        plugins.check_needed(record["plugins"])
        config = recorded_config(record, overrides, plugins)
        reports = [PretrainedReport(**report) for report in record["pretrained"]]
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks {error}. Fetch it again.") from error
    model = blank(config, plugins)
    model.pretrained, model.recorded = reports, record["plugins"]
    return model


def recorded_config(record: Mapping[str, Any], overrides: Sequence[str], plugins: Plugins) -> ModelConfig:
    """Resolve a record's model config; a name that several plugins share here means the recorded one."""
    then = plugins.as_recorded(record["plugins"])
    config = resolve(load_config(record["model"], overrides, then), ModelConfig, then)
    for _, part in parts_in(config):
        part.name = then.full_name(part.slot, part.name)
    return config


def blank(config: ModelConfig, plugins: Plugins | None = None, *, root: str = "") -> JanusModel:
    """Build a model whose parameters take no memory; ``root`` as in `assemble`."""
    with parameters_on_meta():
        return assemble(config, plugins, weights=False, root=root)


def filled(
    model: JanusModel,
    tensors: Mapping[str, Tensor],
    what: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> JanusModel:
    """Fill a blank model with native names and tensors; return it, ready for use."""
    outcome = fill(model, tensors.items(), device=device, dtype=dtype)
    outcome.check(what, [module_path(path) for path, _ in parts_in(model.config)])
    settle(model, device=device, dtype=dtype)
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
        chosen = getattr(torch, dtype, None)
        if not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
            raise CheckpointError(
                f"there is no dtype '{dtype}': expected auto, float32, bfloat16 or float16."
            )
        return chosen
    if torch.device(device).type == "cpu":
        return torch.float32
    names = sorted(weights, key=lambda name: not name.startswith("backbone."))
    return next((weights[n].dtype for n in names if weights[n].is_floating_point()), torch.float32)
