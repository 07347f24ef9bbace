"""Named axes of graphs: how many there are at least, usually and at most. Declared before any file format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A length that is known only when a graph runs."""

    name: str
    min: int
    typical: int
    max: int

    def __post_init__(self) -> None:
        """Raise ValueError for a range that is empty or out of order."""
        if not 1 <= self.min <= self.typical <= self.max:
            raise ValueError(
                f"axis '{self.name}': expected 1 <= min <= typical <= max, got"
                f" {self.min}, {self.typical}, {self.max}"
            )


@dataclass(frozen=True)
class Ranges:
    """The lengths that axes may have; graphs are exported, and engines tuned, for them."""

    rows: Axis  # R: sequences side by side; under guidance an image takes two
    tokens: Axis  # T: positions fed at once: 1 in a step, a whole prompt in a prefill
    capacity: Axis  # S: positions that a row has room for
    images: Axis  # N: images side by side

    def axis(self, name: str) -> Axis:
        """Return an axis by its name."""
        axis: Axis = getattr(self, name)
        return axis

    @classmethod
    def of(cls, *, context: int, rows: int = 8, capacity: int = 1024, images: int = 4) -> Ranges:
        """Choose ranges for a model with a context of that many positions."""
        capacity = min(capacity, context)
        return cls(
            rows=Axis("rows", 1, min(2, rows), rows),
            tokens=Axis("tokens", 1, 1, capacity),
            capacity=Axis("capacity", 2, capacity, context),
            images=Axis("images", 1, 1, images),
        )
