"""Which parameters of a model are trained: the module paths of a config's ``learn``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice

from rich.table import Table
from torch import nn

from janus_modular.capabilities import PartiallyTrainable
from janus_modular.errors import ConfigError
from janus_modular.model.model import JanusModel
from janus_modular.sequence import Sequence as TokenSequence
from janus_modular.suggest import did_you_mean
from janus_modular.training.objective import OBJECTIVE, Multimodal
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import BatchBuilder
from janus_modular.training.step_builder import StepBuilder

MAX_PROBED = 256
"""Samples of a phase that are read to find one whose loss reaches a trainable parameter."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of a component."""

    path: str
    trainable: int
    frozen: int


def set_trainable(
    model: JanusModel, patterns: Sequence[str], trains: Sequence[str] = Multimodal.trains
) -> None:
    """Make the modules (or parameters) that ``patterns`` match trainable, and freeze all others.

    ``trains`` are the paths that the gradients of the run's objective reach.

    A frozen module gets no gradient and is in eval mode: running statistics and dropout stay still. Two kinds
    of submodules stay frozen within a matched module: the frozen submodules of the generation path (its image
    tokenizer), which may not be matched themselves, unless the objective trains them; and whatever a
    `PartiallyTrainable` component (adapters) does not train, unless a pattern matches inside that component.

    Raises:
        ConfigError: lists every pattern that matches nothing, or that the objective cannot train.
    """
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    frozen = [f"generation.{name}" for name in model.generation.frozen_submodules]
    always_frozen = [path for path in frozen if not any(_within(trained, path) for trained in trains)]
    matched: set[str] = set()
    errors = []
    for pattern in patterns:
        matches = [name for name in names if _matches(name, pattern)]
        if not matches:
            errors.append(f"learn: '{pattern}' matches nothing. {_hint(pattern, names)}")
        for name in matches:
            if any(_within(name, path) for path in always_frozen):
                errors.append(
                    f"learn: '{pattern}' names {name}, which is trained separately, before the stages, by an"
                    " objective of its own: its codes are targets here. It gets no gradient: leave it out."
                )
                break
            if not any(_within(name, path) for path in trains):
                errors.append(
                    f"learn: '{pattern}' names {name}, which gets no gradient; expected"
                    f" {' or '.join(trains)}, which the objective trains, or modules inside."
                )
                break
        matched.update(matches)
    if errors:
        raise ConfigError("\n".join(errors))

    partially_trainable = {
        path: [f"{path}.{name}" for name in module.trainable_parameters()]
        for path, module in model.named_modules()
        if isinstance(module, PartiallyTrainable)
    }

    def is_excluded(name: str, match: str) -> bool:
        """Return True if a component within ``match`` does not train ``name``, which is inside it."""
        return any(
            _within(component, match)
            and _within(name, component)
            and not any(_within(name, path) for path in trainable)
            for component, trainable in partially_trainable.items()
        )

    def is_trainable(name: str) -> bool:
        is_matched = any(_within(name, match) and not is_excluded(name, match) for match in matched)
        return is_matched and not any(_within(name, path) for path in always_frozen)

    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_trainable(name):
            parameter.requires_grad_(True)
    for name, module in model.named_modules():
        module.training = is_trainable(name)


def check_wrapped(config: TrainConfig, model: JanusModel) -> None:
    """Check that the run trains something of each wrapper that it puts around a component.

    A wrapper with ``pretrained`` weights has an effect also where it is frozen, as has one whose parameters
    are not adapters.

    Raises:
        ConfigError: names the wrappers whose adapters would stay as they start, without an effect.
    """
    idle = []
    for path, wrap in (config.wrap or {}).items():
        wrapper = model.get_submodule(path)
        if wrap.get("pretrained") is not None or not isinstance(wrapper, PartiallyTrainable):
            continue
        own = [*wrapper.trainable_parameters()]
        trained = [name for name, parameter in wrapper.named_parameters() if parameter.requires_grad]
        if not any(_within(name, path) for name in trained for path in own):
            idle.append(f"wrap.{path}: '{wrap['name']}'")
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} would have no effect: found learn: [{', '.join(config.learn)}], which trains"
            " none of its parameters; expected the component. Add it to learn, or leave it out of wrap."
        )


def check_reached(model: JanusModel, builder: StepBuilder, config: TrainConfig) -> None:
    """Check that in each phase of the mixture, some loss reaches a trainable parameter.

    Of examples, every loss does: the objective says what it trains, and `set_trainable` compares that.

    Every loss reaches the backbone; it reaches the understanding path from samples with an input image, and
    the generation path from samples with a target image. Samples are read up to the first that suffices.

    Raises:
        ConfigError: none of the first samples of a phase suffices; names its sources.
        DataError: a sample that is read cannot be used.
    """
    trainable = {
        name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if "backbone" in trainable or not isinstance(builder, BatchBuilder):
        return

    def reaches(sequence: TokenSequence) -> bool:
        reached = {"understanding": sequence.understanding_pixels, "generation": sequence.generation_images}
        return any(reached[path] for path in trainable)

    start, last = 0, config.schedule.num_steps
    for phase in config.mixture_phases():
        end = min(phase.until or last, last)
        refs = (ref for step in range(start, end) for ref in builder.mixture.sample_refs(step))
        samples = [*islice(refs, MAX_PROBED)]
        sequences = (sequence for ref in samples for sequence in builder.prepare(ref).sequences)
        if samples and not any(map(reaches, sequences)):
            sources = ", ".join(sorted({ref.source for ref in samples}))
            raise ConfigError(
                f"learn: [{', '.join(config.learn)}] learns nothing from step {start:,} on: none of the first"
                f" {len(samples):,} samples (sources: {sources}) has a loss that reaches it. Expected samples"
                " with an input image for understanding, with a target image (task: draw) for generation: add"
                " them to the mixture, or backbone to learn."
            )
        start = end


def untrained_warning(names: Sequence[str], steps: int) -> str:
    """Return the warning that no loss of the first ``steps`` steps reached these trainable parameters."""
    modules = {".".join(name.split(".")[: 1 if name.startswith("backbone.") else 2]) for name in names}
    where = ", ".join(names if len(names) <= 3 else sorted(modules))
    return (
        f"learn: in {steps:,} steps no loss has reached {len(names):,} of the trainable parameters ({where}):"
        " they are as they were at the start. Leave their modules out of learn, or add samples whose losses"
        " reach them."
    )


def parameter_counts(model: JanusModel) -> list[ParameterCount]:
    """Return the parameter counts of each component (``understanding.encoder``, ``backbone`` ...)."""
    return [ParameterCount(path, *_count(module)) for path, module in _components(model)]


def trainable_table(model: JanusModel, objective: nn.Module | None = None) -> Table:
    """Return parameter counts as a table for the terminal, with a row for an objective's own parameters."""
    view = Table("module", "trainable", "frozen", title="Parameters")
    for column in view.columns[1:]:
        column.justify = "right"
    for count in parameter_counts(model):
        view.add_row(count.path, _millions(count.trainable), _millions(count.frozen))
    if objective is not None and any(own := _count(objective)):
        view.add_row(f"{OBJECTIVE} (not in the model)", *map(_millions, own))
    view.add_section()
    view.add_row("all", *(_millions(number) for number in _count(model)))
    return view


def _components(model: JanusModel) -> Iterator[tuple[str, nn.Module]]:
    for path in ("understanding", "generation"):
        for name, module in getattr(model, path).named_children():
            yield f"{path}.{name}", module
    yield "backbone", model.backbone  # type: ignore[misc]  # components are modules that match a protocol


def _count(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of frozen parameters."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in module.parameters()) - trainable


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M" if count else "-"


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _matches(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _hint(pattern: str, names: Sequence[str]) -> str:
    """Return the names at the first level of ``pattern`` that matches nothing."""
    levels = pattern.split(".")
    for depth in range(len(levels)):
        prefix = ".".join(levels[: depth + 1])
        if not any(_matches(name, prefix) for name in names):
            parent = ".".join(levels[:depth])
            children = [
                name
                for name in names
                if name.count(".") == depth and (not depth or _matches(name.rpartition(".")[0], parent))
            ]
            words = dict.fromkeys(name.rpartition(".")[2] for name in children)
            known = ", ".join([*words][:12]) or "nothing"
            return f"{parent or 'The model'} holds: {known}. {did_you_mean(levels[depth], words)}".rstrip()
    return ""
