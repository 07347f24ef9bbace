"""The configuration of an export. A YAML file in configs/export is an instance of `ExportConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from janus_export.bundle.axes import Ranges
from janus_export.bundle.modes import MODES, graphs_of
from janus_export.bundle.sizes import parse_bytes
from janus_export.errors import ExportError
from janus_modular.arguments import SHORT_DTYPES
from janus_modular.suggest import did_you_mean


@dataclass(frozen=True)
class Variant:
    """A variant of the graphs: its dtype and quantisation."""

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


HEAD = "sample_text"
"""The graph with whose weights token embeddings may be tied."""

BLOCK_SIZES = (16, 256)
"""Smallest and largest number of weights per scale that ONNX Runtime's CPU kernels of MatMulNBits support."""

MOST_SIDE_BY_SIDE = 4096
"""Largest number of rows or images per run of a graph; no machine has memory for a larger KV cache."""

TYPICAL_CAPACITY = 1024  # enough for a prompt, an image of 576 positions, and text


RECOMMENDED: Mapping[str, Mapping[str, int]] = {
    "nbits": {"backbone": 4, "embed": 4, "sample_text": 8, "understand": 8},
    "qdq": {"backbone": 4},
}
"""The graphs that are quantised by default, by form, and the minimum bits of each.

The image head and the image tokenizer are small, and lose more accuracy than they save memory. TensorRT has
no lookup in a quantised table, and fuses only the backbone's products.
"""

STORAGE = ("fp16", "fp32")


@dataclass
class QuantizeConfig:
    """How quantised variants quantise weights."""

    # Graphs whose linear layers are quantised; `embed` means the token embeddings in all graphs.
    # null: backbone, embed, sample_text and understand for ONNX Runtime, backbone for TensorRT.
    graphs: list[str] | None = None
    # Bits of single graphs that differ from the variant's: {sample_text: 8}. If graphs is null,
    # sample_text and understand have at least 8 bits.
    bits: dict[str, int] = field(default_factory=dict)
    block_size: int = 32  # weights that share a scale; a power of two, 16 to 256
    # Arithmetic of ONNX Runtime: 1 float32, 2 float16, 3 bfloat16, 4 int8 (activations are rounded too);
    # 0: ONNX Runtime's default.
    accuracy_level: int = 4


@dataclass
class ExportConfig:
    """The variants, modes, ranges of axes, quantisation and storage of a bundle."""

    variants: list[str] = field(default_factory=lambda: ["fp32"])  # fp32, fp16, bf16, cpu-int8, cpu-int4, ...
    only: list[str] = field(default_factory=list)  # modes: text, understanding, drawing; none: all
    rows: int = 8  # batch rows; an image with guidance takes two
    capacity: int | None = None  # positions of a typical session; None: 1024, or the context if it is less
    images: int = 4  # images per batch
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    # fp16 or fp32: how cpu-int8 and cpu-int4 store what they do not quantise. They compute in float32.
    storage: str = "fp16"
    max_file_size: str | None = None  # maximum size of a weight file: 2GB, 500MiB; None: no limit

    def __post_init__(self) -> None:
        """Raise an error for invalid settings, with a line for each that begins with its field."""
        self.variants = [SHORT_DTYPES.get(name, name) for name in self.variants]
        checks = (self._variants, self._modes, self._lengths, self._quantization, self._unused, self._storage)
        if problems := [problem for check in checks for problem in check()]:
            raise ExportError("\n".join(problems))

    def exports(self, graph: str) -> bool:
        """Return True if a graph is exported; a graph that is not the core's is the generation path's."""
        return bool(graphs_of(self.only or MODES, [graph]))

    @property
    def lowered_beside(self) -> tuple[str, ...]:
        """The graphs that are not exported, but lowered to find the quantised weights that they share.

        Tied token embeddings have the bits of the text head even if no text is generated, so that a bundle
        with fewer modes draws the same images as a complete bundle.
        """
        quantises = any(HEAD in self._bits_of_all(name) for name in self._quantising())
        return (HEAD,) if quantises and not self.exports(HEAD) else ()

    def bits(self, variant: str) -> dict[str, int]:
        """Return the bits of each graph that a variant quantises; also of those that are `lowered_beside`."""
        bits = self._bits_of_all(variant).items()
        return {name: n for name, n in bits if self.exports(name) or name in self.lowered_beside}

    def _bits_of_all(self, variant: str) -> dict[str, int]:
        """Return the bits of each graph that a variant quantises where all modes are exported."""
        known = VARIANTS[variant]
        if known.bits is None:
            return {}
        if self.quantize.graphs is None:
            bits = {name: max(known.bits, n) for name, n in RECOMMENDED[known.form].items()}
        else:
            bits = dict.fromkeys(self.quantize.graphs, known.bits)
        return bits | {name: n for name, n in self.quantize.bits.items() if name in bits}

    def stored_as(self, variant: str) -> str:
        """Return how a variant stores what it does not quantise: fp32, fp16, bf16."""
        known = VARIANTS[variant]
        return self.storage if known.bits and known.dtype == "fp32" else known.dtype

    def ranges(self, context: int) -> Ranges:
        """Choose the ranges of axes for a model with a context of ``context`` positions.

        Raises:
            ExportError: the capacity is beyond the context.
        """
        if self.capacity is not None and self.capacity > context:
            raise ExportError(
                f"capacity: {self.capacity}; expected {context} at most, the model's context. The default is"
                f" {min(TYPICAL_CAPACITY, context)}."
            )
        capacity = self.capacity or TYPICAL_CAPACITY
        return Ranges.of(context=context, rows=self.rows, capacity=capacity, images=self.images)

    def _variants(self) -> Iterator[str]:
        if not self.variants:
            yield f"variants: empty; expected at least one. Known: {', '.join(VARIANTS)}"
        for name in self.variants:
            if name not in VARIANTS:
                hint = did_you_mean(name, VARIANTS)
                yield f"variants: there is no variant '{name}'. {hint} Known: {', '.join(VARIANTS)}"
        for name in dict.fromkeys(self.variants):
            if self.variants.count(name) > 1:
                yield f"variants: '{name}' is named {self.variants.count(name)} times; expected once"

    def _lengths(self) -> Iterator[str]:
        for name in ("rows", "images"):
            value = getattr(self, name)
            if not 1 <= value <= MOST_SIDE_BY_SIDE:
                yield f"{name}: {value:.6g}; expected 1 to {MOST_SIDE_BY_SIDE}"
        if self.capacity is not None and self.capacity < 2:
            yield f"capacity: {self.capacity}; expected 2 at least"

    def _modes(self) -> Iterator[str]:
        for name in self.only:
            if name not in MODES:
                hint = did_you_mean(name, MODES)
                yield f"only: no mode is called '{name}'. {hint} Modes: {', '.join(MODES)}"

    def _quantization(self) -> Iterator[str]:
        quantize, quantising = self.quantize, self._quantising()
        for key, names in (("graphs", quantize.graphs or ()), ("bits", quantize.bits)):
            for name in dict.fromkeys(names):
                if not set(self.only) - set(MODES) and not self.exports(name):
                    yield f"quantize.{key}: '{name}' is not exported with only={', '.join(self.only)}"
        if quantize.graphs == [] and quantising:
            yield "quantize.graphs: empty, but a variant is quantised; expected a graph, such as backbone"
        chosen = {graph for name in quantising for graph in self.bits(name)}
        for name, bits in quantize.bits.items():
            if bits not in (4, 8):
                yield f"quantize.bits: {bits} of '{name}'; expected 4 or 8"
            if quantising and name not in chosen:
                yield f"quantize.bits: '{name}' is not quantised; name it in quantize.graphs too"
        size, (least, most) = quantize.block_size, BLOCK_SIZES
        if not least <= size <= most or size & (size - 1):
            yield f"quantize.block_size: {size}; expected a power of two, {least} to {most}"
        if quantize.accuracy_level not in range(5):
            yield f"quantize.accuracy_level: {quantize.accuracy_level}; expected 0 to 4"

    def _unused(self) -> Iterator[str]:
        """Find settings that differ from their default, and change nothing in any of the variants."""
        if set(self.variants) - set(VARIANTS):
            return
        quantising, default = self._quantising(), QuantizeConfig()
        no_variant = f"no variant of {', '.join(self.variants)}"
        changed = [
            each.name
            for each in fields(QuantizeConfig)
            if getattr(self.quantize, each.name) != getattr(default, each.name)
        ]
        if not quantising:
            for name in changed:
                yield (
                    f"quantize.{name}: has no effect: {no_variant} quantises. Leave it out, or add a variant"
                    " such as cpu-int4"
                )
        elif "accuracy_level" in changed and all(VARIANTS[name].form != "nbits" for name in quantising):
            yield (
                f"quantize.accuracy_level: has no effect: {no_variant} multiplies by MatMulNBits."
                " Leave it out"
            )
        if self.storage == "fp32" and all(VARIANTS[name].dtype != "fp32" for name in quantising):
            yield (
                f"storage: fp32 has no effect: {no_variant} is cpu-int8 or cpu-int4, the others have one"
                " dtype"
            )

    def _storage(self) -> Iterator[str]:
        if self.storage not in STORAGE:
            yield f"storage: '{self.storage}'; expected {' or '.join(STORAGE)}"
        if self.max_file_size is not None:
            try:
                parse_bytes(self.max_file_size)
            except ValueError as error:
                yield f"max_file_size: {error}"

    def _quantising(self) -> list[str]:
        return [name for name in self.variants if name in VARIANTS and VARIANTS[name].bits]
