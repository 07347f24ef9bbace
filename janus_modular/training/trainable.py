"""What learns and what is frozen: module paths in a config, decided before anything else is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rich.table import Table
from torch import nn

from janus_modular.errors import ConfigError
from janus_modular.model.model import JanusModel
from janus_modular.protocols import PartiallyTrainable
from janus_modular.suggest import did_you_mean


@dataclass(frozen=True)
class ParameterCount:
    """A part of the model, as the table shows it."""

    path: str
    learns: int  # parameters
    frozen: int  # parameters


def choose(model: JanusModel, patterns: Sequence[str]) -> None:
    """Let the modules (or parameters) that ``patterns`` name learn, and freeze all others.

    A frozen module gets no gradient and is in eval mode: moving averages and dropout stay still. What a
    generation path trains apart (its image tokenizer) gets no gradient from a stage, so that naming it
    is an error, and naming all that is above it leaves it frozen. Of a component that learns in part
    (`PartiallyTrainable`: adapters), the rest is left frozen as well, unless a pattern names something inside
    it.

    Raises:
        ConfigError: lists every pattern that matches nothing, or that a stage cannot train.
    """
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    apart = [f"generation.{name}" for name in model.generation.frozen_submodules]
    chosen: set[str] = set()
    errors = []
    for pattern in patterns:
        matches = [name for name in names if _matches(name, pattern)]
        if not matches:
            errors.append(f"learn: '{pattern}' matches nothing. {_cure(pattern, names)}")
        for name in matches:
            if any(_within(name, one) for one in apart):
                errors.append(
                    f"learn: '{pattern}' names {name}, which is trained on its own, before the stages: its"
                    " codes are targets here, and no gradient reaches it. Leave it out."
                )
                break
        chosen.update(matches)
    if errors:
        raise ConfigError("\n".join(errors))

    partly = {
        name: [f"{name}.{one}" for one in module.trainable_parameters()]
        for name, module in model.named_modules()
        if isinstance(module, PartiallyTrainable)
    }

    def held(name: str, by: str) -> bool:
        """Say whether a component leaves ``name`` frozen where ``by`` names it or what is above."""
        return any(
            _within(part, by) and _within(name, part) and not any(_within(name, one) for one in own)
            for part, own in partly.items()
        )

    def learns(name: str) -> bool:
        named = any(_within(name, one) and not held(name, by=one) for one in chosen)
        return named and not any(_within(name, one) for one in apart)

    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if learns(name):
            parameter.requires_grad_(True)
    for name, module in model.named_modules():
        module.training = learns(name)


def learning(model: JanusModel) -> list[ParameterCount]:
    """Return the parts of the figure (``understanding.encoder``, ``backbone`` ...) with their sizes."""
    return [ParameterCount(path, *_sizes(module)) for path, module in _parts(model)]


def table(model: JanusModel) -> Table:
    """Return what learns and what is frozen, for printing."""
    view = Table("module", "learns", "frozen", title="What learns")
    for column in view.columns[1:]:
        column.justify = "right"
    for one in learning(model):
        view.add_row(one.path, _millions(one.learns), _millions(one.frozen))
    view.add_section()
    view.add_row("all", *(_millions(n) for n in _sizes(model)))
    return view


def _parts(model: JanusModel) -> Iterator[tuple[str, nn.Module]]:
    for path in ("understanding", "generation"):
        for name, module in getattr(model, path).named_children():
            yield f"{path}.{name}", module
    yield "backbone", model.backbone  # type: ignore[misc]  # parts are modules that match a protocol


def _sizes(module: nn.Module) -> tuple[int, int]:
    learns = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return learns, sum(p.numel() for p in module.parameters()) - learns


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M" if count else "-"


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _matches(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _cure(pattern: str, names: Sequence[str]) -> str:
    """Say where a pattern leaves the model, and what stands there."""
    steps = pattern.split(".")
    for depth in range(len(steps)):
        here = ".".join(steps[: depth + 1])
        if not any(_matches(name, here) for name in names):
            above = ".".join(steps[:depth])
            there = [n for n in names if n.count(".") == depth and (not depth or _matches(_up(n), above))]
            words = dict.fromkeys(name.rpartition(".")[2] for name in there)
            rest = ", ".join([*words][:12]) or "nothing"
            return f"{above or 'The model'} holds: {rest}. {did_you_mean(steps[depth], words)}".rstrip()
    return ""


def _up(name: str) -> str:
    return name.rpartition(".")[0]
