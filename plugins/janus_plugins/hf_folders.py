"""Folders that transformers wrote: what they say of their weights, and whether a config says the same.

A component with ``pretrained`` is built by the folder's own description. What its ``config`` writes besides
is held to that: a key that differs is an error, and a key that is not written is the folder's.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from janus_modular import CheckpointError, ConfigError, DescriptionError, Difference, refuse_quantized

ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"}
"""How configs were written before ``rope_parameters``, into which transformers turns them."""

WITHOUT_EFFECT = {
    "architectures", "attn_implementation", "auto_map", "dtype", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
"""Keys that change nothing of what a model computes here."""

ADAPTER = "adapter_config.json"
"""The file by which transformers knows peft's adapters; it would put them on the weights unasked."""

RECOMPUTED = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")
"""Buffers that older files hold, and that every model makes anew."""


def is_described(path: Path) -> bool:
    """Return True if a folder or file says which model its weights are of."""
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def describing_folder(path: Path) -> Path:
    """Return the folder whose files describe some weights: for a file, that which holds it."""
    return path if path.is_dir() else path.parent


def refuse_adapters(path: Path) -> None:
    """Refuse a folder of peft's adapters, or of weights beside them.

    Raises:
        CheckpointError: there is an adapter, which transformers would add to the weights.
    """
    if (path / ADAPTER).is_file():
        raise CheckpointError(
            f"{path} holds an adapter of peft's ({ADAPTER}), and whole weights were expected. Put an adapter"
            " on a decoder with {name: lora, pretrained: ADAPTER, rank: ..., backbone: {name: hf, pretrained:"
            f" BASE}}}}; for weights without their adapter, take {ADAPTER} out of the folder."
        )


def read_config(path: Path, expected: str) -> PreTrainedConfig:
    """Read the transformers config in a folder or a GGUF file; ``expected`` is what was expected.

    Raises:
        CheckpointError: there is none, none that transformers understands, or the weights are quantised.
    """
    refuse_quantized(path)
    refuse_adapters(path)
    gguf = path.name if path.suffix == ".gguf" else None
    try:
        return AutoConfig.from_pretrained(
            path.parent if gguf else path,
            gguf_file=gguf,
            local_files_only=True,
            trust_remote_code=False,  # None would ask, on a terminal
        )
    except (
        StrictDataclassError, OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError,
        struct.error,
    ) as error:  # fmt: skip
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"{path} holds no config of {expected} that transformers {transformers.__version__} can read:"
            f" {' '.join(lines[:2]) or type(error).__name__}"
        ) from error


def check_described(
    written: Mapping[str, Any], candidates: Sequence[PreTrainedConfig], path: Path, *, option: str = "config"
) -> None:
    """Hold the keys that a config writes to the description that lies beside the weights.

    Args:
        written: transformers' keys, as in the config.
        candidates: the described config, and the part of it that is taken: keys may be written for either.
        path: the folder or file that describes itself.
        option: the component's option that the keys stand under.

    Raises:
        DescriptionError: lists every key that differs, with both values.
    """
    family = written.get("model_type")
    described = next((one for one in candidates if one.model_type == family), candidates[-1])
    differences: list[Difference] = []
    if family is not None and described.model_type != family:
        differences.append(Difference(f"{option}.model_type", family, described.model_type))
    applied = _applied(described, written)
    if rope := ROPE_KEYS & written.keys():
        before, after = described.to_dict().get("rope_parameters"), applied.get("rope_parameters")
        if not _same(after, before) or not _same(before, after):
            differences += [Difference(f"{option}.{key}", written[key], before) for key in sorted(rope)]
    for key, value in written.items():
        if key == "model_type" or key in ROPE_KEYS | WITHOUT_EFFECT or key.startswith("_"):
            continue
        if not hasattr(described, key):
            continue  # no key of the family: `check_keys` has reported it
        found = _plain(getattr(described, key))
        if not _same(value, found) and not _same(applied.get(key, value), found):
            differences += _leaves(f"{option}.{key}", value, found)
    if differences:
        raise DescriptionError(str(path), differences, drop=option)


def with_overrides(described: PreTrainedConfig, overrides: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """Return a described config in which some keys are changed on purpose.

    Raises:
        ConfigError: a key is none of the family's, or transformers refuses its value.
    """
    if not overrides:
        return described
    if unknown := [key for key in overrides if not hasattr(described, key)]:
        raise ConfigError(f"{where}: '{described.model_type}' has no keys {', '.join(sorted(unknown))}")
    try:
        return type(described).from_dict({**_base(described), **overrides})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"transformers refuses {where}: {error}") from error


def unused_weights(names: Iterable[str], model: nn.Module) -> tuple[list[str], list[str]]:
    """Part the names that a model did not take into those inside its own modules, and those of other parts.

    Buffers that are computed anew belong to neither.
    """
    buffers = {name for name, _ in model.named_buffers()}
    children = dict(model.named_children())
    inside: list[str] = []
    outside: list[str] = []
    for name in sorted(names):
        if name in buffers or RECOMPUTED.search(name):
            continue
        first, dot, _ = name.partition(".")
        (inside if dot and first in children else outside).append(name)
    return inside, outside


def refuse_misshapen(path: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse weights of another shape than the built model's, as transformers lists them.

    Raises:
        CheckpointError: lists them, each with both shapes.
    """
    if listed := sorted(f"{n}: found {tuple(has)}, expected {tuple(w)}" for n, has, w in mismatched):
        raise CheckpointError(
            f"{path} has {len(listed)} weights of another shape than the model that was built:"
            f" {'; '.join(listed[:3])}. Leave out config and config_overrides, so that it is built as the"
            " folder describes it; if it was, its config.json is not the one of these weights."
        )


def refuse_unused(path: Path, names: Sequence[str], what: str) -> None:
    """Refuse weights of a part for which the built model has no place: it is another than the folder's.

    Raises:
        CheckpointError: lists them.
    """
    if names:
        listed = "".join(f"\n    {name}" for name in names[:8])
        more = f"\n    ... and {len(names) - 8} more" if len(names) > 8 else ""
        raise CheckpointError(
            f"{path} does not fit: {len(names)} of its weights have no place in {what}:{listed}{more}\n"
            "Leave out config and config_overrides, so that the model is built as the folder describes it; if"
            " it was, its config.json is not the one of these weights."
        )


def _applied(described: PreTrainedConfig, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the described config becomes where the written keys are put in: families derive values."""
    base = _base(described)
    if ROPE_KEYS & written.keys():
        base.pop("rope_parameters", None)
    keys = {key: value for key, value in written.items() if key != "model_type"}
    try:
        config = type(described).from_dict({**base, **keys})
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError):
        return dict(keys)  # they cannot be put in: so they differ
    return {key: _plain(getattr(config, key)) for key in {*keys, "rope_parameters"} if hasattr(config, key)}


def _base(described: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's own keys, less those that a vision model works out from its number of layers."""
    stages = ("stage_names", "out_features", "out_indices")
    return {key: value for key, value in described.to_dict().items() if key not in stages}


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, PreTrainedConfig) else value


def _same(written: Any, described: Any) -> bool:
    """Compare values, numbers in float32, as GGUF files hold them; of mappings, the keys that are written."""
    if isinstance(written, float) and isinstance(described, float):
        return bool(np.float32(written) == np.float32(described))
    if isinstance(written, Mapping):
        return isinstance(described, Mapping) and all(
            key in described and _same(value, described[key])
            for key, value in written.items()
            if key not in WITHOUT_EFFECT
        )
    if isinstance(written, list | tuple) and isinstance(described, list | tuple):
        return len(written) == len(described) and all(map(_same, written, described))
    return bool(written == described)


def _leaves(key: str, written: Any, described: Any) -> list[Difference]:
    """List what differs inside mappings, one by one."""
    if isinstance(written, Mapping) and isinstance(described, Mapping):
        return [
            leaf
            for name, value in written.items()
            if name not in WITHOUT_EFFECT and not _same(value, described.get(name, "nothing"))
            for leaf in _leaves(f"{key}.{name}", value, described.get(name, "nothing"))
        ]
    return [Difference(key, written, described)]
