"""Configs: `load` reads YAML and applies overrides, `resolve` checks the result and builds dataclasses.

`load` reads which component fills which slot (``encoder: {name: siglip, feature_dim: 1024}``); `resolve`
checks each component's options against the dataclass that it registered. A config cannot name code: a
component is a registered name, never an import path.
"""

from janus_modular.config.errors import FieldError
from janus_modular.config.presets import shipped, shipped_folder
from janus_modular.config.reading import load, override
from janus_modular.config.resolving import resolve
from janus_modular.config.writing import component_specs, flatten, module_path, to_plain, to_yaml

__all__ = [
    "FieldError",
    "component_specs",
    "flatten",
    "load",
    "module_path",
    "override",
    "resolve",
    "shipped",
    "shipped_folder",
    "to_plain",
    "to_yaml",
]
