"""Reads the configs of transformers' folders, and checks a component's config against them.

A component with ``pretrained`` is built by the folder's config.json. Keys that the component's ``config``
writes must have the same values there; keys that it does not write come from there.
"""

from __future__ import annotations

import copy
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from janus_modular import (
    CheckpointError,
    ConfigError,
    DescriptionError,
    Difference,
    open_weights,
    refuse_quantized,
)
from janus_plugins.hf_rope_keys import (
    ROPE_KEYS,
    overruled_rope_keys,
    refuse_overruled,
    without_overridden,
)

WITHOUT_EFFECT = {
    "architectures", "attn_implementation", "auto_map", "dtype", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
"""Keys that do not change what a model computes."""

DERIVED = {"layer_types", "mlp_layer_types", "no_rope_layers"}
"""Lists with an entry for each layer, which families derive from other keys unless they are written."""

ADAPTER = "adapter_config.json"
"""The file of peft's adapters; transformers would apply such an adapter without being asked."""

RECOMPUTED = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")
"""Buffers in older files, which every model computes itself."""


DECODER_PREFIXES = {
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?!lm_head)": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""The names of a multimodal checkpoint's decoder, in new and old formats, and the decoder's own names."""

BUFFERS = re.compile(RECOMPUTED.pattern + r"|\.attention\.bias$|\.num_batches_tracked$")
"""Names of buffers, which may be integers or truth values."""


def is_described(path: Path) -> bool:
    """Return True if a folder or file contains a config of its model."""
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def describing_folder(path: Path) -> Path:
    """Return the folder with the config of some weights: a file's parent, or the folder itself."""
    return path if path.is_dir() else path.parent


def refuse_adapters(path: Path) -> None:
    """Check that a folder has no peft adapter.

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
    """Read the transformers config of a folder or a GGUF file; ``expected`` names its model in errors.

    Raises:
        CheckpointError: there is no config, transformers cannot read it, or the weights are quantised.
    """
    refuse_quantized(path)
    refuse_adapters(path)
    gguf = path.name if path.suffix == ".gguf" else None
    try:
        return AutoConfig.from_pretrained(
            path.parent if gguf else path,
            gguf_file=gguf,
            local_files_only=True,
            trust_remote_code=False,  # None would ask on a terminal
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
    """Check the keys of a config against the config beside the weights.

    Args:
        written: transformers' keys, as in the config.
        candidates: the described config, and the part of it that is used; keys may belong to either.
        path: the folder or file with the described config.
        option: the component's option that contains the keys.

    Raises:
        DescriptionError: lists every key that differs, with both values.
    """
    if differences := _differences(written, candidates, option):
        raise DescriptionError(str(path), differences, drop=option)


def _differences(
    written: Mapping[str, Any], candidates: Sequence[PreTrainedConfig], option: str
) -> list[Difference]:
    """Return the keys that differ from those of the candidate that has them, in nested configs by key."""
    family = written.get("model_type")
    described = next((c for c in candidates if c.model_type == family), candidates[-1])
    differences: list[Difference] = []
    if family is not None and described.model_type != family:
        differences.append(Difference(f"{option}.model_type", family, described.model_type))
    owners = [described, *(c for c in candidates if c is not described)]
    own: list[dict[str, Any]] = [{} for _ in owners]
    for key, value in written.items():
        if key == "model_type" or key in WITHOUT_EFFECT or key.startswith("_"):
            continue
        # An unknown key is reported by `check_keys`; the older ones are no attributes.
        i = 0 if key in ROPE_KEYS else next((i for i, c in enumerate(owners) if hasattr(c, key)), None)
        if i is None:
            continue
        nested = getattr(owners[i], key, None)
        if isinstance(nested, PreTrainedConfig) and isinstance(value, Mapping):
            differences += _differences(value, [nested], f"{option}.{key}")
        else:
            own[i][key] = value
    for owner, keys in zip(owners, own, strict=True):
        differences += _own_differences(keys, owner, option)
    return differences


def _own_differences(
    written: Mapping[str, Any], described: PreTrainedConfig, option: str
) -> list[Difference]:
    differences: list[Difference] = []
    applied = _applied(described, written)
    if rope := ROPE_KEYS & written.keys():
        before, after = described.to_dict().get("rope_parameters"), applied.get("rope_parameters")
        if not _same(after, before) or not _same(before, after):
            differences += [Difference(f"{option}.{key}", written[key], before) for key in sorted(rope)]
        else:
            overruled = overruled_rope_keys(written, before)
            differences += [replace(difference, key=f"{option}.{difference.key}") for difference in overruled]
    for key, value in written.items():
        if key in ROPE_KEYS:
            continue
        described_value = _plain(getattr(described, key))
        if not _same(value, described_value) and not _same(applied.get(key, value), described_value):
            differences += _leaves(f"{option}.{key}", value, described_value)
    return differences


def with_overrides(described: PreTrainedConfig, overrides: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """Return a described config with ``overrides`` applied.

    Raises:
        ConfigError: the family has no such key, or transformers rejects its value.
    """
    if not overrides:
        return described
    base = _base(described)
    known_rope = ROPE_KEYS if base.get("rope_parameters") else set()
    if unknown := [key for key in overrides if not hasattr(described, key) and key not in known_rope]:
        raise ConfigError(f"{where}: '{described.model_type}' has no keys {', '.join(sorted(unknown))}")
    family = type(described)
    try:
        base = without_overridden(_without_derived(family, base, overrides, where), overrides)
        built = family.from_dict(copy.deepcopy({**base, **overrides}))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"transformers refuses {where}: {error}") from error
    kept = {key: base[key] for key in base.keys() & ROPE_KEYS if key not in described.to_dict()}
    refuse_overruled({**kept, **overrides}, built, where)
    return built


def _without_derived(
    family: type[PreTrainedConfig], base: dict[str, Any], overrides: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return a config's keys without the lists for each layer that ``overrides`` change.

    Raises:
        ConfigError: the config has a list other than the derived list, which would overrule ``overrides``.
    """
    for key in base.keys() & DERIVED - overrides.keys():
        rest = {name: value for name, value in base.items() if name != key}
        before, after = (
            getattr(family.from_dict(copy.deepcopy(keys)), key) for keys in (rest, {**rest, **overrides})
        )
        if before == after:
            continue
        if before != base[key]:
            raise ConfigError(
                f"{where}: {key} would be derived from {', '.join(overrides)}, but the described config"
                f" writes {key}={base[key]}, which comes first. Write {where}.{key} too."
            )
        base = rest
    return base


def unused_weights(names: Iterable[str], model: nn.Module) -> tuple[list[str], list[str]]:
    """Split unused names into those of the model's own modules and those of other modules.

    Buffers that the model computes itself are in neither list.
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
    """Check that transformers reported no weights of other shapes than the model's.

    Raises:
        CheckpointError: lists them, each with both shapes.
    """
    if listed := sorted(f"{n}: found {tuple(has)}, expected {tuple(w)}" for n, has, w in mismatched):
        raise CheckpointError(
            f"{path} has {len(listed)} weights of another shape than the model that was built:"
            f" {'; '.join(listed[:3])}. Leave out config and config_overrides, so that it is built as the"
            " folder describes it; if it was, its config.json is not the one of these weights."
        )


def refuse_integers(path: Path, names: Iterable[str] | None = None) -> None:
    """Check that weights are floating-point numbers: transformers would convert integers, which are codes.

    ``names``: the weights to check; None: all in the folder.

    Raises:
        CheckpointError: lists weights that are not, with their dtypes.
    """
    weights = open_weights(path)
    wrong = [
        f"{name}: found {weights[name].dtype}"
        for name in sorted(weights if names is None else names)
        if not BUFFERS.search(name) and not weights[name].is_floating_point()
    ]
    if wrong:
        raise CheckpointError(
            f"{path} has {len(wrong)} weights that are no floating-point numbers: {'; '.join(wrong[:3])}."
            " Expected plain weights: if these are quantised, name the folder that they were quantised from."
        )


def refuse_unused(path: Path, names: Sequence[str], component: str) -> None:
    """Check that no weights inside the model's modules are unused: it would differ from the folder's model.

    Raises:
        CheckpointError: lists the unused weights.
    """
    if names:
        listed = "".join(f"\n    {name}" for name in names[:8])
        more = f"\n    ... and {len(names) - 8} more" if len(names) > 8 else ""
        raise CheckpointError(
            f"{path} does not fit: {len(names)} of its weights have no place in {component}:{listed}{more}\n"
            "Leave out config and config_overrides, so that the model is built as the folder describes it; if"
            " it was, its config.json is not the one of these weights."
        )


def _applied(described: PreTrainedConfig, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the described config's values with the written keys applied; families derive some values."""
    base = _base(described)
    if ROPE_KEYS & written.keys():
        base.pop("rope_parameters", None)
    keys = {key: value for key, value in written.items() if key != "model_type"}
    try:
        config = type(described).from_dict(copy.deepcopy({**base, **keys}))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError):
        return dict(keys)  # they cannot be applied, so they differ
    return {key: _plain(getattr(config, key)) for key in {*keys, "rope_parameters"} if hasattr(config, key)}


def _base(described: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's keys, except those that a vision model derives from its number of layers."""
    stages = ("stage_names", "out_features", "out_indices")
    return {key: value for key, value in described.to_dict().items() if key not in stages}


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, PreTrainedConfig) else value


def _same(written: Any, described: Any) -> bool:
    """Compare values: numbers in float32, as GGUF files store them; mappings by the written keys."""
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
    """Return the differences of two values, inside mappings by key."""
    if isinstance(written, Mapping) and isinstance(described, Mapping):
        return [
            leaf
            for name, value in written.items()
            if name not in WITHOUT_EFFECT and not _same(value, described.get(name, "nothing"))
            for leaf in _leaves(f"{key}.{name}", value, described.get(name, "nothing"))
        ]
    return [Difference(key, written, described)]


def text_part(family: PreTrainedConfig) -> PreTrainedConfig:
    """Return the decoder's config in a larger model's config; the same config if it is a decoder's."""
    text = family.get_text_config(decoder=True)
    if text is not family:  # the larger model's config has the key
        text.tie_word_embeddings = family.tie_word_embeddings
    return text


def is_part(family: PreTrainedConfig) -> bool:
    """Return True if the decoder is part of a larger, multimodal model."""
    return family.get_text_config(decoder=True) is not family


def decoder_names(names: Iterable[str]) -> set[str]:
    """Return the decoder's own names of its weights in a larger model's files."""
    own = set()
    for name in names:
        for pattern, replacement in DECODER_PREFIXES.items():
            if re.match(pattern, name):
                own.add(re.sub(pattern, replacement, name))
                break
    return own
