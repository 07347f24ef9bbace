"""Finds configs: those that the package ships, by name, and users' files, by path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from janus_modular.errors import ConfigError, JanusError
from janus_modular.foreign import foreign_errors, path_exists, printable
from janus_modular.suggest import did_you_mean


def shipped_folder() -> Path:
    """Return the folder of shipped configs: inside the package once installed, in the root of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped() -> dict[str, Path]:
    """Return every shipped config by name: ``model/tiny``, ``train/janus_pro/stage1``."""
    folder = shipped_folder()
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))
    }


def find(config: str | Path, *, named_in: str | Path | None = None) -> Path:
    """Return the file that ``config`` names: a path, a shipped name, or a model's bare name.

    ``named_in``: the config in which it is named; a file beside that is suggested.

    Raises:
        ConfigError: there is no such file.
    """
    with foreign_errors(f"the config '{config}'", ConfigError, "Check the path."):
        path = Path(config).expanduser()
        if path.is_file():
            return path
        is_folder = path.is_dir()
    known = shipped()
    name = str(config).removesuffix(".yaml")
    if file := _shipped_file(name, known):
        return file
    quoted = f"'{printable(config)}'"
    problem = f"{quoted} is a folder" if is_folder else f"there is no config {quoted}"
    files = [str(file) for file in Path().glob("*.yaml")]
    beside = None if named_in is None else Path(named_in).expanduser().parent / Path(config)
    if beside is not None and beside.is_file():
        raise ConfigError(
            f"{problem}: expected a path from the working directory, as every path in a config is. Write"
            f" '{printable(beside)}'."
        )
    hint = did_you_mean(str(config), files) or did_you_mean(
        name, [*known, *(preset.removeprefix("model/") for preset in known)]
    )
    raise ConfigError(
        f"{problem}: expected a YAML file or a shipped name. {hint}".rstrip()
        + "\nSee the shipped ones with: janus-modular config list"
    )


def refuse_config_name(model: str | Path, *, error: type[JanusError]) -> None:
    """Check that a model's name is not the name of a shipped config, unless it is also a path.

    Raises:
        JanusError: of class ``error``.
    """
    if not path_exists(model) and _shipped_file(str(model).removesuffix(".yaml"), shipped()):
        raise error(
            f"'{model}' is a config, which has no weights; expected a model: a folder or a hub id. Train one"
            " (janus-modular train CONFIG), or use a published one (deepseek-ai/Janus-Pro-1B)."
        )


def _shipped_file(name: str, known: Mapping[str, Path]) -> Path | None:
    candidates = (name, name.removeprefix("configs/"), f"model/{name}")
    return next((known[candidate] for candidate in candidates if candidate in known), None)
