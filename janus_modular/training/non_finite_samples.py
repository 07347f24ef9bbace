"""After a loss that is not finite: which samples of the step give it, by name and as a page."""

from __future__ import annotations

from pathlib import Path

import torch

from janus_modular.atomic_writes import write_text
from janus_modular.errors import list_briefly
from janus_modular.foreign import reason
from janus_modular.model.model import JanusModel
from janus_modular.objectives import Objective
from janus_modular.processing.processor import Processor
from janus_modular.training.engine import Engine
from janus_modular.training.failing_components import recording_non_finite
from janus_modular.training.objective import to_device
from janus_modular.training.run_folder import step_name
from janus_modular.training.sample_preview import StepPreview, as_html, previews
from janus_modular.training.step_batches import BatchBuilder, with_equal_passes
from janus_modular.training.step_builder import PreparedSample, StepBatch, StepBuilder
from janus_modular.training.validation import evaluating

FOLDER = "non_finite"

MAX_NAMED = 5
"""Samples that the message names; the page has all."""


def describe_samples(
    model: JanusModel,
    engine: Engine[StepBatch],
    builder: StepBuilder,
    processor: Processor,
    output: Path,
    objective: Objective,
    *,
    is_sharded: bool,
) -> str:
    """Return which samples of the step that failed have losses that are not finite, each run alone.

    The first component of the model whose output is not finite, for such a sample, is named too.
    All processes call this. The blocks of a sharded model run on all of them together, so that each runs as
    many passes as any. This process's samples are written to ``non_finite/step-N.html`` in the run's folder.
    What fails here is only noted: it must not hide the error that it explains.
    """
    try:
        samples, components = _search(model, engine, builder, objective, is_sharded=is_sharded)
        of_ranks = engine.processes.gather(([_name(sample, builder) for sample in samples], components))
        names = [name for names, _ in of_ranks for name in names]
        first = next((components[0] for _, components in of_ranks if components), None)
        cause = f" The first component whose output is not finite is {first}." if first else ""
        if not names:
            return (
                "Each of the step's samples has finite losses alone, without dropout: the gradients are too"
                " large, or a sample fails only beside others."
            )
        named = list_briefly(names, MAX_NAMED)
        if not isinstance(builder, BatchBuilder):
            return f"Losses of these samples are not finite, alone too: {named}.{cause}"
        folder, rank = output / FOLDER, engine.processes.rank
        if samples:
            spans_of_samples = [
                each for sample in samples for each in previews(sample, builder.mixture, processor)
            ]
            preview = StepPreview(spans_of_samples, builder.mixture, engine.schedule.num_steps)
            folder.mkdir(parents=True, exist_ok=True)
            of_rank = "" if engine.processes.world == 1 else f"-rank{rank}"
            page = as_html(preview, title=f"Not finite: step {engine.next_step}")
            write_text(folder / f"{step_name(engine.next_step)}{of_rank}.html", page)
        return (
            f"Losses of these samples are not finite, alone too: {named}. See the pages in {folder}.{cause}"
        )
    except Exception as error:
        return f"The samples of the step could not be searched: {reason(error)}"


@torch.no_grad()
def _search(
    model: JanusModel,
    engine: Engine[StepBatch],
    builder: StepBuilder,
    objective: Objective,
    *,
    is_sharded: bool,
) -> tuple[list[PreparedSample], list[str]]:
    """Return this process's samples of the step whose losses are not finite, and the components to blame."""
    processes = engine.processes
    refs = builder.sample_refs(engine.next_step)
    prepared = processes.together(lambda: [builder.prepare(ref) for ref in refs])
    pairs = [(sample, builder.alone(sequence)) for sample in prepared for sequence in sample.sequences]
    batches = [batch for _, batch in pairs]
    if is_sharded and isinstance(builder, BatchBuilder):
        batches = with_equal_passes(batches, processes)
    non_finite: list[PreparedSample] = []
    causes: list[str] = []
    with evaluating(engine.module, engine.device, engine.autocast):
        for number, batch in enumerate(batches):
            on_device = to_device(batch, engine.device)
            of_batch: list[str] = []
            with recording_non_finite(model, of_batch):
                losses = objective.losses(model, on_device, step=engine.next_step).terms.values()
            is_finite = all(bool(loss.isfinite().all()) for loss in losses)
            causes += of_batch if not is_finite else []
            if not is_finite and number < len(pairs) and pairs[number][0] not in non_finite:
                non_finite.append(pairs[number][0])
    return non_finite, causes


def _name(sample: PreparedSample, builder: StepBuilder) -> str:
    return f"sample {builder.mixture.index(sample.ref)} of source '{sample.ref.source}'"
