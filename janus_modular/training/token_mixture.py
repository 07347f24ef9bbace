"""Mixtures by tokens: shares of positions, as shares of samples of the sources' mean lengths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from janus_modular.errors import ConfigError, DataError, JanusError
from janus_modular.training.mixture import Mixture, MixturePhase, SampleRef, samples_before
from janus_modular.training.sample_workers import SampleWorkers, WorkerType
from janus_modular.training.step_batches import BatchBuilder

log = logging.getLogger(__name__)

MEASURED_SAMPLES = 256
"""First samples of each source whose mean length is taken: with lengths that vary by half of their mean, the
mean is known within 3 %."""


def mixed_by_tokens(
    builder: BatchBuilder,
    phases: Sequence[MixturePhase],
    steps: int,
    *,
    workers: int = 0,
    worker_type: WorkerType = "thread",
) -> BatchBuilder:
    """Return a builder whose sources have the given shares of positions, before packing and cutting.

    Which samples a step has still follows from its number: shares of samples are fixed once, from the mean
    lengths of the sources' first samples.

    Raises:
        DataError: none of the first samples of a source can be used.
        ConfigError: a source gets no sample in ``steps`` steps of its phase.
    """
    lengths = mean_lengths(builder, workers=workers, worker_type=worker_type)
    converted = [
        replace(
            phase,
            shares={name: share / lengths[name] if share else 0.0 for name, share in phase.shares.items()},
        )
        for phase in phases
    ]
    _check_samples(converted, builder.mixture, lengths, steps)
    mixture = builder.mixture
    mixed = Mixture(mixture.sources, converted, mixture.batch, mixture.seed, mixture.variants)
    return replace(builder, mixture=mixed)


def mean_lengths(
    builder: BatchBuilder, *, workers: int = 0, worker_type: WorkerType = "thread"
) -> dict[str, float]:
    """Return the mean number of positions of each source's first samples; unusable ones are left out.

    Raises:
        DataError: none of them can be used.
    """
    means = {}
    with SampleWorkers(partial(_length, builder), workers, worker_type) as pool:
        for name, source in builder.mixture.sources.items():
            num_measured = min(MEASURED_SAMPLES, len(source))
            refs = (SampleRef(name, number) for number in range(num_measured))
            lengths = [length for length in pool.map(refs) if length]
            if not lengths:
                raise DataError(
                    f"source '{name}': none of the first {num_measured} samples can be used, so that the mean"
                    " length, which mixture_unit=tokens needs, is unknown. `janus-modular data check CONFIG`"
                    " names the reasons."
                )
            means[name] = sum(lengths) / len(lengths)
    return means


def _length(builder: BatchBuilder, ref: SampleRef) -> int:
    """Return the positions of a sample before it is cut or split; 0 if it cannot be used."""
    try:
        return len(builder.sequence(builder.mixture.sample(ref), False))
    except (JanusError, OSError, UnicodeError) as error:
        log.debug("source '%s', sample %d is not measured: %s", ref.source, ref.number, error)
        return 0


def _check_samples(
    phases: Sequence[MixturePhase], mixture: Mixture, lengths: Mapping[str, float], steps: int
) -> None:
    start = 0
    for phase in phases:
        end = min(phase.until or steps, steps)
        counts = samples_before([MixturePhase(phase.shares)], mixture.batch, max(0, end - start))
        for name, share in phase.shares.items():
            if share and not counts[name]:
                raise ConfigError(
                    f"mixture.{name}: its share of the tokens gives no sample, of {lengths[name]:,.0f} on"
                    f" average, in {end - start:,} steps; raise it or batch, or set it to 0."
                )
        start = end
