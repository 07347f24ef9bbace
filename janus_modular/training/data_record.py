"""What a run's data were: recorded in its checkpoints, and compared when the run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from janus_modular.errors import TrainingError
from janus_modular.protocols import Fingerprinted, Source
from janus_modular.training.bad_samples import BadSampleCounter
from janus_modular.training.mixture import count_samples
from janus_modular.training.schema import BadSamplesConfig
from janus_modular.training.step_batches import StepBatch

log = logging.getLogger(__name__)


class DataRecord:
    """The size and the fingerprint of each source, what changed at resumes, and how many samples were bad."""

    def __init__(self, sources: Mapping[str, Source], policy: BadSamplesConfig) -> None:
        """Take the fingerprint of each source that has one: files are read once for that."""
        self.sources = {name: _describe(name, source) for name, source in sources.items()}
        self.changes: list[dict[str, Any]] = []  # {step, changes}, one for each resume that found any
        self.ledger = BadSampleCounter(policy)
        self._before: tuple[int, dict[str, Any]] = (-1, {})  # a step whose work was passed on; counts before

    def resume(self, training: Mapping[str, Any], *, accept: bool) -> None:
        """Compare with the training record of a checkpoint, and count on from there.

        A run whose checkpoint has no record of its data, from a version without one, is gone on with, and
        that is logged.

        Raises:
            TrainingError: a source is not as it was, and that is not accepted; names what changed. Or the
                record is damaged.
        """
        then = training.get("data")
        if then is None:
            log.warning("the checkpoint has no record of its data: whether they changed cannot be known.")
            return
        try:
            self.ledger.load_state(then["bad_samples"])
            self.changes = list(then["changes"])
            changes = [
                f"source '{name}': {key} was {before[key]}, is {now[key]}"
                for name, before in then["sources"].items()
                if (now := self.sources.get(name)) is not None
                for key in now
                if before[key] != now[key]
            ]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise TrainingError(
                f"the checkpoint's record of its data is damaged: {type(error).__name__}: {error}. Go on from"
                " an earlier checkpoint, or start a new run from its weights by init=CHECKPOINT."
            ) from error
        if not changes:
            return
        lines = "\n".join(f"  {change}" for change in changes)
        effect = "samples of the epoch at hand may come again or be left out"
        if not accept:
            raise TrainingError(
                f"the data are not those that the run was started with:\n{lines}\nPut them back to resume"
                f" exactly; or go on with these by changed_data=accept: {effect}."
            )
        self.changes.append({"step": training["step"], "changes": changes})
        log.warning("going on with other data, as changed_data=accept asks; %s:\n%s", effect, lines)

    def counted(self, steps: Iterable[StepBatch], first: int) -> Generator[StepBatch, None, None]:
        """Pass on the work of each step from ``first`` on, its samples and faults counted.

        Raises:
            DataError: more samples of a source were bad than the limit allows.
        """
        for step, work in enumerate(steps, first):
            self._before = step, self.ledger.state()
            self.ledger.add(work.samples, work.bad_samples)
            yield work

    def to_dict(self, done: int) -> dict[str, Any]:
        """Return the record after so many steps, as JSON can hold it; a step that failed is not counted."""
        step, before = self._before
        bad_samples = before if step == done else self.ledger.state()
        return {"sources": self.sources, "changes": self.changes, "bad_samples": bad_samples}


def _describe(name: str, source: Source) -> dict[str, Any]:
    fingerprint = source.fingerprint() if isinstance(source, Fingerprinted) else None
    return {"samples": count_samples(name, source), "fingerprint": fingerprint}
