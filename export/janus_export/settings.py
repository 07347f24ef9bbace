"""What an export may be asked for. A YAML file in configs/export is a picture of `ExportConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class QuantizeConfig:
    """How weights are rounded, where a variant rounds them."""

    # Graphs whose linear layers are rounded. Heads (text_next, image_next) and the image tokenizer (draw,
    # tokenize_image) lose more than they save.
    graphs: list[str] = field(default_factory=lambda: ["backbone"])
    block_size: int = 32  # weights that share a scale; a power of two, 16 at least
    accuracy_level: int = (
        4  # what ONNX Runtime multiplies in: 1 float32, 4 int8 (activations are rounded too)
    )


@dataclass
class ExportConfig:
    """Which variants, and how large the axes may get."""

    variants: list[str] = field(default_factory=lambda: ["fp32"])  # fp32, fp16, bf16, cpu-int8, cpu-int4, ...
    rows: int = 8  # sequences side by side; a drawing with guidance takes two
    capacity: int = 1024  # positions of a typical session; the context is the limit
    images: int = 4  # pictures side by side
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    def __post_init__(self) -> None:
        """Refuse variants that there are none of, and blocks that no runtime takes."""
        for name in self.variants:
            if name not in VARIANTS:
                hint = did_you_mean(name, VARIANTS)
                raise ExportError(f"there is no variant '{name}'. {hint}\nKnown: {', '.join(VARIANTS)}")
        if not self.variants:
            raise ExportError(f"no variant is asked for. Known: {', '.join(VARIANTS)}")
        size = self.quantize.block_size
        if size < 16 or size & (size - 1):
            raise ExportError(f"quantize.block_size is {size}, expected a power of two, 16 at least")
