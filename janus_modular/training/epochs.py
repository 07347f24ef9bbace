"""How often a run goes through each source."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from janus_modular.training.mixture import Mixture


@dataclass(frozen=True)
class SourceUse:
    """What a run takes from a source."""

    source: str
    samples: int  # that the source has
    taken: int  # by the whole run

    @property
    def epochs(self) -> float:
        """How often each sample is taken, on average."""
        return self.taken / self.samples


def source_use(mixture: Mixture, steps: int) -> list[SourceUse]:
    """Return what ``steps`` steps take from each source."""
    taken = mixture.taken(steps)
    return [SourceUse(name, len(source), taken[name]) for name, source in mixture.sources.items()]


HEADS = ("source", "samples", "taken", "epochs")


def cells(use: SourceUse) -> tuple[str, str, str, str]:
    """Return a row below ``HEADS``."""
    return use.source, f"{use.samples:,}", f"{use.taken:,}", f"{use.epochs:,.3g}"


def epochs_table(mixture: Mixture, steps: int) -> Table:
    """Return the table for the terminal."""
    view = Table(*HEADS, title=f"The run: {steps:,} steps of {mixture.batch:,} samples")
    for column in view.columns[1:]:
        column.justify = "right"
    for use in source_use(mixture, steps):
        view.add_row(*cells(use))
    return view
