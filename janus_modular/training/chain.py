"""A chain of training configs: each stage starts from the result of the stage before. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from janus_modular.config import load, resolve
from janus_modular.errors import ConfigError
from janus_modular.plugins import Plugins
from janus_modular.training.schema import TrainConfig


@dataclass
class ChainConfig:
    """Training configs that run in this order."""

    chain: list[str]  # files or shipped names; a stage is named by the last part: stage1
    output: str | None = None  # stages write to OUTPUT/STAGE; null: to the output of their own configs

    def __post_init__(self) -> None:
        """Check the names."""
        names = self.names
        if not names or len(set(names)) < len(names):
            listed = ", ".join(names) or "none"
            raise ValueError(f"chain: found {listed}; expected training configs with different names.")

    @property
    def names(self) -> list[str]:
        """The names of the stages, in order: ``stage1`` for ``train/janus_pro/stage1``."""
        return [Path(stage).stem for stage in self.chain]


OF_EVERY_STAGE = {field.name for field in fields(TrainConfig)} - {field.name for field in fields(ChainConfig)}
"""The keys of a training config that a chain does not have itself."""


def _first_key(override: str) -> str:
    """Return the first part of an override's key: ``stage1`` of ``stage1.batch=64``."""
    return override.partition("=")[0].partition(".")[0]


def load_stages(config: str, overrides: Sequence[str], plugins: Plugins) -> dict[str, TrainConfig] | None:
    """Return the training configs of a config with ``chain``, by name; None if it has no ``chain``.

    An override that begins with the name of a stage changes this stage: ``stage1.batch=64``. A key of
    training configs changes every stage that has no override of its own: ``batch=64``. Others change the
    chain's config.

    Raises:
        ConfigError: a config cannot be resolved, or a stage does not start from the result of the one before.
    """
    if "chain" not in (raw := load(config, (), plugins)):
        return None
    names = resolve(raw, ChainConfig, plugins).names
    shared = [text for text in overrides if _first_key(text) in OF_EVERY_STAGE - set(names)]
    own = [text for text in overrides if _first_key(text) not in {*names, *OF_EVERY_STAGE}]
    whole = resolve(load(config, own, plugins), ChainConfig, plugins)
    stages: dict[str, TrainConfig] = {}
    before: TrainConfig | None = None
    for name, file in zip(whole.names, whole.chain, strict=True):
        changes = [
            *shared,
            *(text.removeprefix(f"{name}.") for text in overrides if _first_key(text) == name),
        ]
        if whole.output is not None:
            changes.append(f"output={Path(whole.output) / name}")
            changes += [f"init={Path(before.output) / 'model'}"] if before else []
        try:
            stage = load(file, changes, plugins, named_in=config)
            if before and stage.get("model") is not None:
                raise ConfigError(
                    "found `model`; expected none, because this stage starts from the result of the stage"
                    f" before. Remove it there, or set {name}.model=null."
                )
            stages[name] = resolve(stage, TrainConfig, plugins)
        except ConfigError as error:
            raise ConfigError(f"{name} ({file}): {error}", error.errors) from error
        if before and stages[name].init != str(Path(before.output) / "model"):
            raise ConfigError(
                f"{name}: init is {stages[name].init}; expected {Path(before.output) / 'model'}, the result"
                f" of the stage before. Set {name}.init, or output=FOLDER for all stages."
            )
        before = stages[name]
    return stages
