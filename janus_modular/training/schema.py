"""The configuration of training: what learns, from what, how fast and for how long. A stage is one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from janus_modular.config.schema import ModelConfig
from janus_modular.interfaces import ComponentSpec, component
from janus_modular.suggest import did_you_mean
from janus_modular.training.mixture import MixturePhase, taken

MAX_COUNT = 1_000_000
"""Largest batch, accumulate and number of workers: lists and threads of that many are made."""

MAX_SHARE = 1_000_000_000
"""Largest share of a source in a mixture: sums and products of shares stay exact enough to count with."""


@dataclass
class OptimizerConfig:
    """AdamW (decoupled weight decay), and how long a gradient may be."""

    lr: float = 1e-3  # highest learning rate; the schedule scales it
    betas: tuple[float, float] = (0.9, 0.95)  # of the moving averages of gradient and square
    weight_decay: float = 0.0  # on matrices alone: not on biases, norms or embeddings
    clip: float | None = 1.0  # longest gradient, all parameters together; null: no limit

    def __post_init__(self) -> None:
        """Refuse values that no training survives."""
        sound = 0 < self.lr < inf and 0 <= self.weight_decay < inf and all(0 <= b < 1 for b in self.betas)
        if not sound or not (self.clip is None or self.clip > 0):
            raise ValueError(
                f"lr {self.lr}, weight_decay {self.weight_decay}, betas {self.betas}, clip {self.clip}:"
                " expected lr above 0, weight_decay of at least 0, betas from 0 to below 1, and clip above 0"
                " or null."
            )


@dataclass
class ScheduleConfig:
    """How the learning rate goes, and how many steps there are."""

    steps: int = 1000  # updates; a cosine ends here
    name: Literal["constant", "cosine"] = "constant"
    warmup: int = 0  # first steps, over which the rate rises in a straight line
    final: float = 0.0  # where a cosine ends, as a share of lr
    stop: int | None = None  # end after this many steps, before the schedule does

    def __post_init__(self) -> None:
        """Refuse a run without steps."""
        if self.steps < 1 or self.warmup < 0 or (self.stop is not None and self.stop < 1):
            raise ValueError(
                f"steps {self.steps}, warmup {self.warmup}, stop {self.stop}: expected at least 1, 0 and 1."
            )

    @property
    def last(self) -> int:
        """How many steps are taken in all."""
        return self.steps if self.stop is None else min(self.steps, self.stop)


@dataclass
class BadSamplesConfig:
    """What happens to samples that cannot be used as they are; all but errors are counted in the metrics."""

    unreadable: Literal["error", "skip"] = (
        "error"  # lines and images that cannot be read; text not in Unicode
    )
    unsupervised: Literal["error", "skip"] = "error"  # nothing in them is learned: empty answers, say
    too_long: Literal["error", "skip", "cut", "split"] = (
        "error"  # for a row; cut: the end is left out, split: plain text goes on in further rows
    )
    limit: float = 0.1  # share of a source's samples that may be skipped or cut before the run stops

    def __post_init__(self) -> None:
        """Refuse a limit that is no share."""
        if not 0 <= self.limit <= 1:
            raise ValueError(f"limit: {self.limit}; expected a share, from 0 to 1.")


@dataclass
class TrainConfig:
    """One run of training: a stage."""

    learn: list[str]  # module paths, ``*`` for one name in a path; nothing else is trained
    sources: dict[str, ComponentSpec] = component("sources")  # by a name of your choice
    mixture: Any = (
        None  # shares of the sources in the steps' samples, {name: share}; or [{until: step, name: share}]
    )
    model: ModelConfig | None = (
        None  # a shipped name, a path or a mapping: starts from its `pretrained` parts
    )
    init: str | None = None  # a checkpoint folder to start from, instead of `model`
    wrap: Any = None  # a backbone that holds another, put around that of `init`: {name: lora, rank: 16}
    batch: int = 256  # samples a step, before packing
    length: int | None = 4096  # positions of a packed row; null: a row for each sample
    accumulate: int = 1  # pieces that a step's rows are cut into, to need less memory; the result is the same
    supervise: Literal["all", "answers"] = "all"  # which words are learned; images to draw always are
    bad_samples: BadSamplesConfig = field(default_factory=BadSamplesConfig)
    changed_data: Literal["refuse", "accept"] = (
        "refuse"  # when a run is resumed and a source is not as it was
    )
    condition_dropout: float = 0.1  # chance that what an image is drawn from is replaced by pads
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # to compute in; weights stay float32. auto: bfloat16 on CUDA
    )
    device: str = "auto"  # auto: cuda, else mps, else cpu
    seed: int = 0  # of all chance: the order of samples, and what is done to them
    workers: int = 2  # threads that prepare samples ahead; 0: none
    checkpoint_every: int = 1000  # steps
    keep: int = 2  # newest checkpoints that stay on disk
    log_every: int = 10  # steps; what is logged is the mean over them
    output: str = "runs/train"  # folder of checkpoints, logs and the finished model
    trackers: list[ComponentSpec] = component("trackers")  # who keeps the figures

    def __post_init__(self) -> None:
        """Check what fields say about each other; all that is wrong is said at once."""
        errors = [*self._counts(), *self._mixture()]
        errors = errors or self._never_drawn()
        if not self.learn:
            errors.append(
                "learn: nothing; expected module paths, for instance [generation.adaptor, generation.head]."
            )
        if (self.model is None) == (self.init is None):
            found = "neither" if self.model is None else "both"
            errors.append(
                f"found {found} of model and init; expected one: model=janus_pro_1b, or init=CHECKPOINT."
            )
        named = isinstance(self.wrap, dict) and isinstance(self.wrap.get("name"), str)
        if self.wrap is not None and not named:
            errors.append(f"wrap: found {self.wrap!r}; expected a backbone with options: {{name: lora}}.")
        elif self.wrap is not None and self.init is None:
            errors.append("wrap: goes around the backbone of init, and there is none; write it into model.")
        if not 0 <= self.condition_dropout <= 1:
            errors.append(f"condition_dropout: {self.condition_dropout}; expected a chance, from 0 to 1.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            errors.append(f"device: '{self.device}'; expected auto, cpu, mps, cuda, or cuda:1 and so on.")
        if errors:
            raise ValueError("\n".join(errors))

    def phases(self) -> list[MixturePhase]:
        """Return the mixture as phases, in order."""
        if isinstance(self.mixture, list):
            return [
                MixturePhase({k: float(v) for k, v in one.items() if k != "until"}, one.get("until"))
                for one in self.mixture
            ]
        return [MixturePhase({name: float(share) for name, share in self.mixture.items()})]

    def used(self) -> list[str]:
        """Return the names of the sources that have a share at some step, in order."""
        return [
            name for name in self.sources if any(phase.shares.get(name, 0) > 0 for phase in self.phases())
        ]

    def _counts(self) -> list[str]:
        least = {"batch": 1, "accumulate": 1, "checkpoint_every": 1, "keep": 1, "log_every": 1, "workers": 0}
        least["seed"] = 0
        errors = [
            f"{name}: {getattr(self, name)}; expected at least {low}."
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        errors += [
            f"{name}: {getattr(self, name):,}; expected at most {MAX_COUNT:,}."
            for name in ("batch", "accumulate", "workers")
            if getattr(self, name) > MAX_COUNT
        ]
        if not self.output.strip():
            errors.append(f"output: found {self.output!r}; expected the name of a folder.")
        if self.length is not None and self.length < 1:
            errors.append(f"length: {self.length}; expected positions, or null for a row a sample.")
        return errors

    def _never_drawn(self) -> list[str]:
        """Name the shares that are too small for a single sample."""
        errors, start = [], 0
        for phase in self.phases():
            end = min(phase.until or self.schedule.steps, self.schedule.steps)
            samples = taken([MixturePhase(phase.shares)], self.batch, max(0, end - start))
            errors += [
                f"mixture.{name}: a share of {phase.shares[name]:g} in {sum(phase.shares.values()):g} gives"
                f" no sample in {end - start:,} steps of {self.batch:,}; raise it or batch, or set it to 0."
                for name, count in samples.items()
                if phase.shares[name] and not count and end > start
            ]
            start = end
        return errors

    def _mixture(self) -> list[str]:
        phases = self.mixture if isinstance(self.mixture, list) else [self.mixture]
        if not phases or not all(isinstance(one, dict) for one in phases):
            return [
                f"mixture: found {self.mixture!r}; expected {{source: share}}, say {{pairs: 3, text: 1}}."
            ]
        errors = []
        named = {name for one in phases for name in one if name != "until"}
        for name in sorted(named - set(self.sources)):
            known = ", ".join(self.sources) or "none"
            hint = did_you_mean(name, self.sources)
            errors.append(f"mixture.{name}: no such source; sources: {known}. {hint}".rstrip())
        for name in sorted(set(self.sources) - named):
            errors.append(f"mixture: source '{name}' has no share; give it one, 0 to leave it out.")
        for i, one in enumerate(phases):
            shares = {name: share for name, share in one.items() if name != "until"}
            for name, share in shares.items():
                number = isinstance(share, int | float) and not isinstance(share, bool)
                if not number or not 0 <= share <= MAX_SHARE:  # NaN is on no side
                    errors.append(
                        f"mixture.{name}: found {share!r:.60}; expected a share from 0 to {MAX_SHARE:,}."
                    )
                    break
            else:
                if not any(shares.values()):
                    errors.append("mixture: all shares are 0; expected one above 0.")
            until, last = one.get("until"), i == len(phases) - 1
            before = phases[i - 1].get("until") if i else 0
            if last and until is not None:
                errors.append(f"mixture: its last phase ends at step {until!r}; leave out its `until`.")
            elif not last and not (type(until) is int and isinstance(before, int) and until > before):
                errors.append(
                    f"mixture: phase {i + 1} has until {until!r}; expected a step after {before!r}."
                )
        return errors
