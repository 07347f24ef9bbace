"""The configuration of a training run: trainable modules, data, optimizer and schedule. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from janus_modular.arguments import dtype_name
from janus_modular.config.schema import ModelConfig
from janus_modular.interfaces import ComponentSpec, component
from janus_modular.suggest import did_you_mean
from janus_modular.training.component_settings import policy_errors, wrap_errors
from janus_modular.training.mixture import MixturePhase, samples_before
from janus_modular.training.validation_schema import ValidationConfig

MAX_COUNT = 1_000_000
"""Largest batch, accumulate and number of workers: each is the length of a list or a number of threads."""

MAX_SHARE = 1_000_000_000
"""Largest share of a source in a mixture, so that sums and products of shares stay exact."""


@dataclass
class OptimizerConfig:
    """AdamW (decoupled weight decay), Muon for groups that ask for it, and gradient clipping."""

    lr: float = 1e-3  # highest learning rate; the schedule scales it
    betas: tuple[float, float] = (0.9, 0.95)  # of the moving averages of gradient and square
    weight_decay: float = 0.0  # on matrices alone: not on biases, norms or embeddings
    clip: float | None = 1.0  # largest norm of the gradient over all parameters; null: no limit
    groups: Any = None  # other values for modules, by path: {backbone: {name: muon, lr: 1e-5}, ...}

    def __post_init__(self) -> None:
        """Raise an error for values with which no training converges."""
        self._check_groups()
        valid = 0 < self.lr < inf and 0 <= self.weight_decay < inf and all(0 <= b < 1 for b in self.betas)
        if not valid or not (self.clip is None or self.clip > 0):
            raise ValueError(
                f"lr {self.lr}, weight_decay {self.weight_decay}, betas {self.betas}, clip {self.clip}:"
                " expected lr above 0, weight_decay of at least 0, betas from 0 to below 1, and clip above 0"
                " or null."
            )

    def _check_groups(self) -> None:
        groups = {} if self.groups is None else self.groups
        if not isinstance(groups, dict):
            raise ValueError(
                f"groups: found {groups!r:.60}; expected module paths with values, say"
                " {backbone: {lr: 1.0e-5}}."
            )
        for path, values in groups.items():
            is_valid = isinstance(values, dict) and values and set(values) <= {"name", "lr", "weight_decay"}
            numbers = [value for key, value in values.items() if key != "name"] if is_valid else []
            if is_valid and values.get("name", "adamw") not in ("adamw", "muon"):
                raise ValueError(f"groups.{path}.name: found {values['name']!r:.60}; expected adamw or muon.")
            if not is_valid or any(type(x) not in (int, float) or not 0 <= x < inf for x in numbers):
                raise ValueError(
                    f"groups.{path}: found {values!r:.60}; expected some of name (adamw or muon), lr and"
                    " weight_decay, the latter numbers from 0: {lr: 1.0e-5, weight_decay: 0.1}. In YAML, 1e-5"
                    " is a text: write 1.0e-5."
                )


@dataclass
class ScheduleConfig:
    """The learning rate over the steps, and the number of steps."""

    steps: int = 1000  # updates; a cosine and the decay of wsd end here
    name: Literal["constant", "cosine", "wsd"] = "constant"  # wsd: constant, then decay
    warmup: int = 0  # first steps, in which the learning rate rises linearly
    decay: int = 0  # last steps of wsd, in which the learning rate falls linearly
    final: float = 0.0  # where a cosine and a decay end, as a share of lr
    stop: int | None = None  # end after this many steps, before the end of the schedule

    def __post_init__(self) -> None:
        """Raise an error for a run without steps, and for a decay that another schedule would ignore."""
        fits = 1 <= self.decay <= self.steps - self.warmup if self.name == "wsd" else self.decay == 0
        if not fits:
            raise ValueError(
                f"name {self.name}, decay {self.decay}, steps {self.steps}, warmup {self.warmup}: expected,"
                " with wsd, a decay from 1 to the steps after the warmup, and 0 with any other."
            )
        if self.final and self.name == "constant":
            raise ValueError(f"final {self.final}: expected 0 with name constant, which does not fall.")
        if self.steps < 1 or self.warmup < 0 or (self.stop is not None and self.stop < 1):
            raise ValueError(
                f"steps {self.steps}, warmup {self.warmup}, stop {self.stop}: expected at least 1, 0 and 1."
            )

    @property
    def num_steps(self) -> int:
        """Return the number of steps of the run."""
        return self.steps if self.stop is None else min(self.steps, self.stop)


@dataclass
class BadSamplesConfig:
    """What is done about samples that cannot be used unchanged; all but errors are counted in the metrics."""

    unreadable: Literal["error", "skip"] = (
        "error"  # lines and images that cannot be read; text not in Unicode
    )
    unsupervised: Literal["error", "skip"] = "error"  # no position is supervised, or an answer is empty
    too_long: Literal["error", "skip", "cut", "split"] = (
        "error"  # for a row; cut: the end is left out, split: plain text continues in further rows
    )
    limit: float = (
        0.1  # share of the samples tried of a source that may be skipped or cut before the run stops
    )

    def __post_init__(self) -> None:
        """Raise an error if the limit is not a share."""
        if not 0 <= self.limit <= 1:
            raise ValueError(f"limit: {self.limit}; expected a share, from 0 to 1.")


@dataclass
class CodesConfig:
    """Codes of target images that are stored before training, by `data encode`."""

    path: str | None = None  # folder of the codes; null: images are encoded in each step
    variants: int | None = (
        None  # random versions of each sample (augmentation, choice of captions); null: a new one each epoch
    )

    def __post_init__(self) -> None:
        """Raise an error for less than a version, and for an empty path."""
        if self.variants is not None and self.variants < 1:
            raise ValueError(f"variants: {self.variants}; expected at least 1, or null.")
        if self.path is not None and not self.path.strip():
            raise ValueError(f"path: found {self.path!r}; expected the name of a folder, or null.")


@dataclass
class TrainConfig:
    """One training run: a stage."""

    learn: list[str]  # module paths, ``*`` for one name in a path; everything else is frozen
    objective: ComponentSpec | None = component(
        "objectives"
    )  # what is minimised, {name: image-reconstruction}; null: multimodal, the loss of Janus' stages
    sources: dict[str, ComponentSpec] = component("sources")  # by a name of your choice
    mixture: Any = (
        None  # shares of the sources in the steps' samples, {name: share}; or [{until: step, name: share}]
    )
    mixture_unit: Literal["samples", "tokens"] = "samples"  # what shares are of; tokens: by mean lengths
    model: ModelConfig | None = (
        None  # a shipped name, a path or a mapping: starts from its `pretrained` components
    )
    init: str | None = None  # a checkpoint folder to start from, instead of `model`
    wrap: Any = None  # components put around those of `init`, by path: {backbone: {name: lora, rank: 16}}
    batch: int = 256  # samples a step, before packing
    length: int | None = 4096  # positions of a packed row; null: a row for each sample
    accumulate: int = 1  # micro-batches of a step: more need less memory; the result is the same
    parallel: dict[str, str] = field(
        default_factory=dict
    )  # of components on several processes, {backbone: fsdp}; ddp: whole on each, the default
    activation_checkpointing: list[str] = field(
        default_factory=list
    )  # components that compute activations again in backward: less memory, the same result
    compile: list[str] = field(default_factory=list)  # components whose blocks torch.compile compiles
    supervise: Literal["all", "answers"] = "all"  # which text is supervised; image targets always are
    bad_samples: BadSamplesConfig = field(default_factory=BadSamplesConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    changed_data: Literal["refuse", "accept"] = "refuse"  # when a source has changed at a resume
    learn_image_ends: bool = False  # the tokens around image targets too: answers may then begin images
    condition_dropout: float = 0.1  # probability that the prompt of an image target is replaced by pads
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: float | None = (
        None  # decay of an average of the trained weights, say 0.9999, kept beside them; null: none
    )
    dtype: Literal["auto", "float32", "bfloat16", "fp32", "bf16"] = (
        "auto"  # to compute in; weights stay float32. auto: bfloat16 on CUDA
    )
    device: str = "auto"  # auto: cuda, else mps, else cpu
    peak_flops: float | None = None  # of one device a second, for MFU: 989.0e12; null: as known for its GPU
    seed: int = 0  # of the order of samples, their augmentation, and dropout
    workers: int = 2  # threads or processes that prepare samples ahead; 0: none
    worker_type: Literal["thread", "process"] = "thread"  # process: where decoding of images binds
    checkpoint_every: int = 1000  # steps
    checkpoint_async: bool = False  # write them while training goes on, from a copy of the state in memory
    keep: int = 2  # newest checkpoints that stay on disk
    log_every: int = 10  # steps; the mean over them is logged
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    output: str = "runs/train"  # folder of checkpoints, logs and the trained model
    trackers: list[ComponentSpec] = component("trackers")  # where metrics are logged

    def __post_init__(self) -> None:
        """Check each field and the fields against each other; all errors are reported at once."""
        self.dtype = dtype_name(self.dtype)
        errors = [*self._value_errors(), *self._mixture_errors()]
        errors = errors or self._share_errors()
        if not self.learn:
            errors.append(
                "learn: nothing; expected module paths, for instance [generation.adaptor, generation.head]."
            )
        if (self.model is None) == (self.init is None):
            which = "neither" if self.model is None else "both"
            errors.append(
                f"found {which} of model and init; expected one: model=janus_pro_1b, or init=CHECKPOINT."
            )
        errors += [*wrap_errors(self.wrap, self.init), *policy_errors(self.parallel)]
        if not 0 <= self.condition_dropout <= 1:
            errors.append(f"condition_dropout: {self.condition_dropout}; expected a probability, 0 to 1.")
        if self.peak_flops is not None and not 0 < self.peak_flops < inf:
            errors.append(f"peak_flops: {self.peak_flops}; expected operations a second, or null.")
        if self.ema is not None and not 0 < self.ema < 1:
            errors.append(f"ema: {self.ema}; expected a decay between 0 and 1, or null.")
        if self.ema is None and self.validation.weights == "ema":
            errors.append("validation.weights: ema averages weights, and is not set; set ema, say to 0.999.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            errors.append(f"device: '{self.device}'; expected auto, cpu, mps, cuda, or cuda:1 and so on.")
        if errors:
            raise ValueError("\n".join(errors))

    def mixture_phases(self) -> list[MixturePhase]:
        """Return the mixture as phases, in order."""
        if isinstance(self.mixture, list):
            return [
                MixturePhase({k: float(v) for k, v in phase.items() if k != "until"}, phase.get("until"))
                for phase in self.mixture
            ]
        return [MixturePhase({name: float(share) for name, share in self.mixture.items()})]

    def used_sources(self) -> list[str]:
        """Return the names of the sources that have a share at some step, in order."""
        phases = self.mixture_phases()
        return [name for name in self.sources if any(phase.shares.get(name, 0) > 0 for phase in phases)]

    def unused_before_stop(self) -> list[str]:
        """Return a remark for each source, phase and learning rate that the last step does not reach.

        No error: such a run may be continued, and each of these has its turn then.
        """
        phases, last, warmup = self.mixture_phases(), self.schedule.num_steps, self.schedule.warmup
        remarks = []
        if warmup > last:
            remarks.append(
                f"schedule.warmup: {warmup:,} steps, and the run ends at step {last:,}: the learning rate"
                f" stays below optimizer.lr, at {last / warmup:.0%} of it at most."
            )
        if self.mixture_unit == "tokens":
            return remarks
        drawn = samples_before(phases, self.batch, last)
        remarks += [
            f"mixture: no sample of source '{name}' is taken before schedule.stop, step {last:,}."
            for name in self.used_sources()
            if not drawn.get(name)
        ]
        return remarks + [
            f"mixture: phase {number} begins at step {phase.until:,}, after schedule.stop, step {last:,}."
            for number, phase in enumerate(phases[:-1], 2)
            if phase.until is not None and phase.until >= last
        ]

    def _value_errors(self) -> list[str]:
        minimum = {"batch": 1, "accumulate": 1, "checkpoint_every": 1, "keep": 1, "log_every": 1}
        minimum |= {"workers": 0, "seed": 0}
        errors = [
            f"{name}: {getattr(self, name)}; expected at least {low}."
            for name, low in minimum.items()
            if getattr(self, name) < low
        ]
        errors += [
            f"{name}: {getattr(self, name):,}; expected at most {MAX_COUNT:,}."
            for name in ("batch", "accumulate", "workers")
            if getattr(self, name) > MAX_COUNT
        ]
        if self.worker_type == "process" and not self.workers:
            errors.append("worker_type: process, which has no effect with workers 0; expected 1 or more.")
        errors += [
            f"trackers[{i}]: equal to another before it; expected each tracker once."
            for i, tracker in enumerate(self.trackers)
            if tracker in self.trackers[:i]
        ]
        if not self.output.strip():
            errors.append(f"output: found {self.output!r}; expected the name of a folder.")
        if self.length is not None and self.length < 1:
            errors.append(f"length: {self.length}; expected positions, or null for a row a sample.")
        return errors

    def _share_errors(self) -> list[str]:
        """Return an error for each share that is too small for a single sample, and for each unused phase."""
        errors, start = [], 0
        phases = self.mixture_phases()
        for number, phase in enumerate(phases, 1):
            if start >= self.schedule.steps:
                errors.append(
                    f"mixture: phase {number} begins at step {phases[number - 2].until:,}, and the run ends"
                    f" at {self.schedule.steps:,} (schedule.steps). Leave it out, or raise schedule.steps;"
                    " to end a run early on purpose, set schedule.stop."
                )
                break
            end = min(phase.until or self.schedule.steps, self.schedule.steps)
            if self.mixture_unit == "tokens":  # known once samples are measured
                start = end
                continue
            samples = samples_before([MixturePhase(phase.shares)], self.batch, end - start)
            errors += [
                f"mixture.{name}: a share of {phase.shares[name]:g} in {sum(phase.shares.values()):g} gives"
                f" no sample in {end - start:,} steps of {self.batch:,}; raise it or batch, or set it to 0."
                for name, count in samples.items()
                if phase.shares[name] and not count
            ]
            start = end
        return errors

    def _mixture_errors(self) -> list[str]:
        phases = self.mixture if isinstance(self.mixture, list) else [self.mixture]
        if not phases or not all(isinstance(phase, dict) for phase in phases):
            return [
                f"mixture: found {self.mixture!r}; expected {{source: share}}, say {{pairs: 3, text: 1}}."
            ]
        errors = []
        mentioned = {name for phase in phases for name in phase if name != "until"}
        for name in sorted(mentioned - set(self.sources)):
            known = ", ".join(self.sources) or "none"
            hint = did_you_mean(name, self.sources)
            errors.append(f"mixture.{name}: no such source; sources: {known}. {hint}".rstrip())
        for name in sorted(set(self.sources) - mentioned):
            errors.append(f"mixture: source '{name}' has no share; give it one, 0 to leave it out.")
        for i, phase in enumerate(phases):
            shares = {name: share for name, share in phase.items() if name != "until"}
            for name, share in shares.items():
                is_number = isinstance(share, int | float) and not isinstance(share, bool)
                if not is_number or not 0 <= share <= MAX_SHARE:  # False for NaN, too
                    errors.append(
                        f"mixture.{name}: found {share!r:.60}; expected a share from 0 to {MAX_SHARE:,}."
                    )
                    break
            else:
                if not any(shares.values()):
                    errors.append("mixture: all shares are 0; expected one above 0.")
            until, is_last = phase.get("until"), i == len(phases) - 1
            start = phases[i - 1].get("until") if i else 0
            if is_last and until is not None:
                errors.append(f"mixture: its last phase ends at step {until!r}; leave out its `until`.")
            elif not is_last and not (type(until) is int and isinstance(start, int) and until > start):
                errors.append(f"mixture: phase {i + 1} has until {until!r}; expected a step after {start!r}.")
        return errors
