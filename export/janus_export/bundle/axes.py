"""Named axes of graphs, with minimum, typical and maximum lengths. Independent of file formats."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Axis:
    """A dynamic axis: its length is known only when a graph runs."""

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
    """The ranges of all axes, for which graphs are exported and engines optimised."""

    rows: Axis  # R: batch rows; with guidance an image takes two
    tokens: Axis  # T: positions fed at once: 1 in a step, a whole prompt in a prefill
    capacity: Axis  # S: capacity of a row, in positions
    images: Axis  # N: images per batch
    image_rows: Axis | None = None  # of positions of an input image, where images have native sizes
    image_columns: Axis | None = None

    def axis(self, name: str) -> Axis:
        """Return an axis by its name."""
        axis: Axis = getattr(self, name)
        return axis

    def with_image_grids(self, most: int) -> Ranges:
        """Return these ranges with those of images in native sizes, of up to ``most`` positions."""
        side = max(1, round(most**0.5) - 1)  # unlike the square's, whose length encoders know
        return replace(
            self,
            image_rows=Axis("image_rows", 1, side, most),
            image_columns=Axis("image_columns", 1, side, most),
        )

    @classmethod
    def of(cls, *, context: int, rows: int = 8, capacity: int = 1024, images: int = 4) -> Ranges:
        """Choose ranges for a model with this context length."""
        capacity = min(capacity, context)
        return cls(
            rows=Axis("rows", 1, min(2, rows), rows),
            tokens=Axis("tokens", 1, 1, capacity),
            capacity=Axis("capacity", 2, capacity, context),
            images=Axis("images", 1, 1, images),
        )
