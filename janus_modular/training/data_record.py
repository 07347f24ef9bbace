"""What a checkpoint records of the data of a run, and the comparison when the run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from janus_modular.errors import TrainingError
from janus_modular.protocols import Fingerprinted, Source
from janus_modular.training.bad_samples import BadSampleCounter
from janus_modular.training.mixture import count_samples
from janus_modular.training.schema import BadSamplesConfig
from janus_modular.training.step_builder import StepBatch

log = logging.getLogger(__name__)


class DataRecord:
    """Size and fingerprint of each source, their changes at resumes, and the numbers of bad samples."""

    def __init__(self, sources: Mapping[str, Source], policy: BadSamplesConfig) -> None:
        """Compute the fingerprint of each source that has one: this reads its files once."""
        self.sources = {name: _describe(name, source) for name, source in sources.items()}
        self.changes: list[dict[str, Any]] = []  # {step, changes}, for each resume with changed data
        self.counter = BadSampleCounter(policy)
        # the step whose batch was yielded last, and the counts before it
        self._before: tuple[int, dict[str, Any]] = (-1, {})

    def resume(self, training: Mapping[str, Any], *, accept: bool) -> None:
        """Compare the sources with the training record of a checkpoint, and continue its counts.

        A checkpoint without a record of its data, from an earlier version, is accepted with a warning.

        Raises:
            TrainingError: a source has changed and that is not accepted; names the changes. Or the record is
                damaged.
        """
        saved = training.get("data")
        if saved is None:
            log.warning("the checkpoint has no record of its data: whether they changed cannot be known.")
            return
        try:
            self.counter.load_state(saved["bad_samples"])
            self.changes = list(saved["changes"])
            changes = [
                f"source '{name}': {key} was {before[key]}, is {now[key]}"
                for name, before in saved["sources"].items()
                if (now := self.sources.get(name)) is not None
                for key in now
                if before[key] != now[key]
            ]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise TrainingError(
                f"the checkpoint's record of its data is damaged: {type(error).__name__}: {error}. Resume"
                " from an earlier checkpoint, or start a new run from its weights by init=CHECKPOINT."
            ) from error
        if not changes:
            return
        lines = "\n".join(f"  {change}" for change in changes)
        effect = "samples of the current epoch may be repeated or left out"
        if not accept:
            raise TrainingError(
                f"the data are not those that the run was started with:\n{lines}\nRestore them to resume"
                f" exactly; or continue with the changed data by changed_data=accept: {effect}."
            )
        self.changes.append({"step": training["step"], "changes": changes})
        log.warning("continuing with changed data, because of changed_data=accept; %s:\n%s", effect, lines)

    def counting(self, batches: Iterable[StepBatch], first: int) -> Generator[StepBatch, None, None]:
        """Yield the batches of the steps from ``first`` on, and count their samples.

        Raises:
            DataError: more samples of a source were bad than the limit allows.
        """
        for step, batch in enumerate(batches, first):
            self._before = step, self.counter.state()
            self.counter.add(batch.samples, batch.bad_samples)
            yield batch

    def to_dict(self, done: int) -> dict[str, Any]:
        """Return the record after ``done`` steps, for JSON; a step that failed is not counted."""
        step, before = self._before
        bad_samples = before if step == done else self.counter.state()
        return {"sources": self.sources, "changes": self.changes, "bad_samples": bad_samples}


def _describe(name: str, source: Source) -> dict[str, Any]:
    fingerprint = source.fingerprint() if isinstance(source, Fingerprinted) else None
    return {"samples": count_samples(name, source), "fingerprint": fingerprint}
