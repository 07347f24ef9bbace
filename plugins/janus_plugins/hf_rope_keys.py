"""Older and present keys of rotary embeddings in transformers' configs, of which one overrules another.

transformers folds the older keys into ``rope_parameters``: a mapping, or one for each type of layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from janus_modular import ConfigError, Difference

OLD_NUMBERS = {
    "rope_theta": ("full_attention", "rope_theta"),
    "rotary_emb_base": ("full_attention", "rope_theta"),
    "rope_local_base_freq": ("sliding_attention", "rope_theta"),
    "partial_rotary_factor": ("full_attention", "partial_rotary_factor"),
    "rotary_pct": ("full_attention", "partial_rotary_factor"),
}
"""Older keys of one number, with the type of layer that has it where layers differ, and its present name."""

ROPE_KEYS = {"rope_scaling", *OLD_NUMBERS}
"""Older keys that transformers converts into ``rope_parameters``."""

COMMON_ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
"""Those of `ROPE_KEYS` that every family with rotary embeddings accepts; others belong to a few families."""


def overruled_rope_keys(written: Mapping[str, Any], rope: Mapping[str, Any] | None) -> list[Difference]:
    """Return the written keys whose values are not in ``rope``, the ``rope_parameters`` that were built.

    Another written key of the same number overruled them, or the family does not read them.
    """
    uses = _uses(written, rope) if rope else ()
    return [Difference(key, value, used) for key, value, used in uses if value != used]


def refuse_overruled(written: Mapping[str, Any], built: Any, where: str) -> None:
    """Check that a built config has the written values of rotary embeddings; ``where`` is the keys' path.

    Raises:
        ConfigError: names the keys that change nothing, with both values.
    """
    if overruled := overruled_rope_keys(written, getattr(built, "rope_parameters", None)):
        listed = "; ".join(
            f"{where}.{each.key} is {each.written!r}, but {each.described!r} would be used"
            for each in overruled
        )
        raise ConfigError(
            f"{listed}. Either two keys are written for one value, or '{built.model_type}' does not read the"
            f" older one: write {where}.rope_parameters alone, which would now be {built.rope_parameters}"
        )


def refuse_unread_factor(model: Any) -> None:
    """Check that rotary embeddings of a model rotate that part of each head that its config has.

    transformers takes ``partial_rotary_factor`` for every family, but most families rotate whole heads.

    Raises:
        ConfigError: the factor is not 1, and all tables of frequencies cover the whole head, or none of it.
    """
    family = model.config
    rope = getattr(family, "rope_parameters", None) or {}
    of_layers = [rope, *(layer for layer in rope.values() if isinstance(layer, Mapping))]
    factors = [
        factor for layer in of_layers if (factor := layer.get("partial_rotary_factor")) not in (None, 1)
    ]
    heads = getattr(family, "num_attention_heads", None)
    head_dim = getattr(family, "head_dim", None) or (heads and family.hidden_size // heads)
    tables = [table for name, table in model.named_buffers() if name.endswith("inv_freq")]
    if factors and not all(table.numel() for table in tables):
        raise ConfigError(
            f"partial_rotary_factor={factors[0]} of {head_dim} dimensions of each head is less than 2, which"
            " rotates none: positions would be lost. Write a larger factor."
        )
    if factors and tables and all(2 * table.numel() == head_dim for table in tables):
        raise ConfigError(
            f"partial_rotary_factor={factors[0]} changes nothing: '{family.model_type}' rotates all"
            f" {head_dim} dimensions of each head. Choose a family that reads it, such as phi, glm or"
            " stablelm; or leave it out (for weights whose heads are rotated whole:"
            " config_overrides.partial_rotary_factor=1)."
        )


def without_overridden(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's keys without those numbers in ``rope_parameters`` that ``overrides`` replace.

    ``rope_scaling`` and ``rope_parameters`` replace the mapping, whose numbers (`OLD_NUMBERS`) are kept where
    they have none.
    """
    rope = copy.deepcopy(base.get("rope_parameters")) or {}
    for key in overrides.keys() & OLD_NUMBERS.keys():
        layer, name = OLD_NUMBERS[key]
        _of_layer(rope, layer).pop(name, None)
    replaced = [key for key in ("rope_scaling", "rope_parameters") if key in overrides]
    if not rope or not replaced:
        return {**base, "rope_parameters": rope} if rope else dict(base)
    own = overrides[replaced[0]] or {}
    numbers = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    kept = {name: value for name, value in numbers.items() if name not in own}
    return {**base, "rope_parameters": kept if replaced[0] == "rope_scaling" and not own else None, **kept}


def _uses(written: Mapping[str, Any], rope: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each written key with its value and the value that is used."""
    nested = any(isinstance(value, Mapping) for value in rope.values())
    for key, (layer, name) in OLD_NUMBERS.items():
        if written.get(key) is not None and (layer in rope or not nested):
            default = 1.0 if name == "partial_rotary_factor" else None
            yield key, written[key], _of_layer(rope, layer).get(name, default)
    full, scaling = _of_layer(rope, "full_attention"), written.get("rope_scaling") or {}
    parameters = _of_layer(written.get("rope_parameters") or {}, "full_attention")
    both = parameters and "rope_scaling" in written
    for key, values in {"rope_scaling": scaling, "rope_parameters": parameters if both else {}}.items():
        for name in values.keys() - {"type", "rope_type"}:  # types that transformers may rename
            yield f"{key}.{name}", values[name], full.get(name)
    if both:
        yield "rope_scaling.rope_type", _type(scaling), _type(parameters)


def _of_layer(rope: Any, layer: str) -> Any:
    return rope[layer] if isinstance(rope.get(layer), Mapping) else rope


def _type(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "default")
