"""A chain of training configs: each stage starts from the result of the stage before. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def load_stages(config: str, overrides: Sequence[str], plugins: Plugins) -> dict[str, TrainConfig] | None:
    """Return the training configs of a config with ``chain``, by name; None if it has no ``chain``.

    An override that begins with the name of a stage changes this stage: ``stage1.batch=64``. Others change
    the chain's own config.

    Raises:
        ConfigError: a config cannot be resolved, or a stage does not start from the result of the one before.
    """
    if "chain" not in (raw := load(config, (), plugins)):
        return None
    names = resolve(raw, ChainConfig, plugins).names
    own = [text for text in overrides if not text.startswith(tuple(f"{name}." for name in names))]
    whole = resolve(load(config, own, plugins), ChainConfig, plugins)
    stages: dict[str, TrainConfig] = {}
    before: TrainConfig | None = None
    for name, file in zip(whole.names, whole.chain, strict=True):
        changes = [text.removeprefix(f"{name}.") for text in overrides if text.startswith(f"{name}.")]
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
