"""From YAML to dataclasses: ``load`` reads a file and applies overrides, ``resolve`` checks and builds.

Two passes. A file says which component sits in which slot (``encoder: {name: siglip, feature_dim: 1024}``);
then each slot's options are checked against the dataclass that its component registered. Nothing in a
file can name code: a component is a registered name, never an import path.
"""

from janus_modular.config.errors import FieldError
from janus_modular.config.presets import shipped, shipped_folder
from janus_modular.config.reading import load, override
from janus_modular.config.resolving import resolve
from janus_modular.config.writing import component_specs, module_path, to_plain, to_yaml

__all__ = [
    "FieldError",
    "component_specs",
    "load",
    "module_path",
    "override",
    "resolve",
    "shipped",
    "shipped_folder",
    "to_plain",
    "to_yaml",
]
