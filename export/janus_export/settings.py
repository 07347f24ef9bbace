"""What an export may be asked for. A YAML file in configs/export is a picture of `ExportConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from janus_export.axes import Ranges
from janus_export.errors import ExportError
from janus_modular.suggest import did_you_mean


@dataclass(frozen=True)
class Variant:
    """One form of the graphs: what its numbers are."""

    dtype: str  # of all that is not quantised: fp32, fp16, bf16
    bits: int | None = None  # of quantised weights
    form: str = "plain"  # "nbits": ONNX Runtime's MatMulNBits; "qdq": standard DequantizeLinear, for TensorRT


VARIANTS = {
    "fp32": Variant("fp32"),
    "fp16": Variant("fp16"),
    "bf16": Variant("bf16"),
    "cpu-int8": Variant("fp32", 8, "nbits"),
    "cpu-int4": Variant("fp32", 4, "nbits"),
    "trt-int4": Variant("fp16", 4, "qdq"),
}


GRAPHS = ("understand", "embed", "backbone", "text_next", "image_next", "draw", "tokenize_image")
"""The graphs that a model becomes, as `janus_export.graphs` declares them; named here without torch."""

BLOCK_SIZES = (16, 256)
"""Fewest and most weights that share a scale: those that ONNX Runtime's CPU kernels of MatMulNBits know."""

TYPICAL_CAPACITY = 1024  # a prompt and a picture of 576 positions, with room for words


@dataclass
class QuantizeConfig:
    """How weights are rounded, where a variant rounds them."""

    # Graphs whose linear layers are rounded. Heads (text_next, image_next) and the image tokenizer (draw,
    # tokenize_image) lose more than they save.
    graphs: list[str] = field(default_factory=lambda: ["backbone"])
    block_size: int = 32  # weights that share a scale; a power of two, 16 to 256
    # What ONNX Runtime multiplies in: 1 float32, 2 float16, 3 bfloat16, 4 int8 (activations are rounded too);
    # 0 leaves it to ONNX Runtime.
    accuracy_level: int = 4


@dataclass
class ExportConfig:
    """Which variants, and how large the axes may get."""

    variants: list[str] = field(default_factory=lambda: ["fp32"])  # fp32, fp16, bf16, cpu-int8, cpu-int4, ...
    rows: int = 8  # sequences side by side; a drawing with guidance takes two
    capacity: int | None = None  # positions of a typical session; None: 1024, or the context if it is less
    images: int = 4  # pictures side by side
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    def __post_init__(self) -> None:
        """Refuse what no bundle can be made of; every fault has a line that begins with its field."""
        if faults := [*self._variants(), *self._lengths(), *self._rounding()]:
            raise ExportError("\n".join(faults))

    def ranges(self, context: int) -> Ranges:
        """Choose how large the axes may get for a model with a context of so many positions.

        Raises:
            ExportError: the capacity is beyond the context.
        """
        if self.capacity is not None and self.capacity > context:
            raise ExportError(
                f"capacity: {self.capacity}; expected {context} at most, the model's context. Left out, it is"
                f" {min(TYPICAL_CAPACITY, context)}."
            )
        capacity = self.capacity or TYPICAL_CAPACITY
        return Ranges.of(context=context, rows=self.rows, capacity=capacity, images=self.images)

    def _variants(self) -> Iterator[str]:
        if not self.variants:
            yield f"variants: none is asked for. Known: {', '.join(VARIANTS)}"
        for name in self.variants:
            if name not in VARIANTS:
                hint = did_you_mean(name, VARIANTS)
                yield f"variants: there is no variant '{name}'. {hint} Known: {', '.join(VARIANTS)}"

    def _lengths(self) -> Iterator[str]:
        for name, least in (("rows", 1), ("capacity", 2), ("images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name}: {value}; expected {least} at least"

    def _rounding(self) -> Iterator[str]:
        for name in self.quantize.graphs:
            if name not in GRAPHS:
                hint = did_you_mean(name, GRAPHS)
                yield f"quantize.graphs: no graph is called '{name}'. {hint} Graphs: {', '.join(GRAPHS)}"
        if not self.quantize.graphs and any(
            name in VARIANTS and VARIANTS[name].bits for name in self.variants
        ):
            yield "quantize.graphs: none, but a variant that rounds is asked for; expected backbone, say"
        size, (least, most) = self.quantize.block_size, BLOCK_SIZES
        if not least <= size <= most or size & (size - 1):
            yield f"quantize.block_size: {size}; expected a power of two, {least} to {most}"
        if self.quantize.accuracy_level not in range(5):
            yield f"quantize.accuracy_level: {self.quantize.accuracy_level}; expected 0 to 4"
