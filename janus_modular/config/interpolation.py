"""Values taken from elsewhere in the same config: ``width: ${model.backbone.config.hidden_size}``."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from janus_modular.config.errors import FieldError
from janus_modular.foreign import reason


def interpolate(tree: dict[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return ``tree`` with its interpolations replaced, and an error for each that points nowhere.

    An interpolation that points nowhere stays as it is: a config into which this one is inserted may hold
    its value.
    """
    try:
        config = OmegaConf.create(tree)
    except Exception as error:  # keys and values of any form: OmegaConf's errors are not all of one class
        if isinstance(error, OmegaConfBaseException) and error.msg:
            return tree, [FieldError(str(error.full_key or ""), str(error.msg).splitlines()[0], "")]
        return tree, [FieldError("", f"it cannot be read: {reason(error)}", "")]
    errors: list[FieldError] = []

    def walk(node: Any, plain: Any, path: str) -> Any:
        if isinstance(plain, dict):
            return {
                key: walk_item(node, key, value, f"{path}.{key}".lstrip(".")) for key, value in plain.items()
            }
        if isinstance(plain, list):
            return [walk_item(node, index, value, f"{path}[{index}]") for index, value in enumerate(plain)]
        return plain

    def walk_item(node: Any, key: Any, value: Any, path: str) -> Any:
        if not (isinstance(value, str) and "${" in value):
            return walk(node[key], value, path) if isinstance(value, dict | list) else value
        try:
            value = node[key]
        except Exception as error:  # a resolver may fail in ways of its own
            errors.append(FieldError(path, f"'{value}' points nowhere: {reason(error)}", ""))
            return value
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    return walk(config, tree, ""), errors
