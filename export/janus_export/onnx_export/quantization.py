"""Quantises weights to 4 or 8 bits, in blocks that share a scale, and packs them. numpy only.

Rounding is symmetric and uses the whole range: the largest weight of a block, whatever its sign, becomes
the lowest code, -8 or -128. No calibration data are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class QuantizationSpec:
    """How weights are quantised, and for which operators."""

    variant: str  # also the name of its weights
    bits: int
    block_size: int
    form: str  # "nbits" or "qdq"
    accuracy_level: int = 0  # of MatMulNBits; 0: ONNX Runtime's default

    @property
    def lowest(self) -> int:
        """The lowest code: -8 for 4 bits."""
        return -(1 << (self.bits - 1))


def scales_of(weight: NDArray[np.float32], quantization: QuantizationSpec) -> NDArray[np.float32]:
    """Return the scales (N, blocks) of weights (N, K)."""
    blocks = _blocks(weight, quantization.block_size)  # (N, blocks, block)
    high, low = blocks.max(-1), blocks.min(-1)
    return np.where(high > -low, high, low) / np.float32(quantization.lowest)


def codes_of(
    weight: NDArray[np.float32], scales: NDArray[np.float32], quantization: QuantizationSpec
) -> NDArray[np.int8]:
    """Return the signed codes (N, blocks, block) of weights (N, K)."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(_blocks(weight, quantization.block_size) * inverse[..., None])
    return codes.clip(quantization.lowest, -quantization.lowest - 1).astype(np.int8)


def pack(codes: NDArray[np.int8], quantization: QuantizationSpec) -> NDArray[np.uint8]:
    """Pack codes (N, blocks, block) into bytes (N, blocks, block * bits / 8), the first in the low bits.

    MatMulNBits takes unsigned codes, with half the range as zero point; ONNX's INT4 is signed.
    """
    plain = codes.view(np.uint8)
    if quantization.form == "nbits":
        plain = plain + np.uint8(-quantization.lowest)
    if quantization.bits == 8:
        return plain
    plain = plain & np.uint8(0xF)
    return plain[..., ::2] | plain[..., 1::2] << np.uint8(4)


def unpack(
    packed: NDArray[np.uint8], scales: NDArray[Any], quantization: QuantizationSpec
) -> NDArray[np.float32]:
    """Return the weights (N, blocks * block) that packed bytes stand for."""
    if quantization.bits == 4:
        packed = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    if quantization.form == "nbits":
        codes = packed.astype(np.int16) + quantization.lowest
    else:
        codes = (
            (packed.astype(np.int16) ^ -quantization.lowest) & (-2 * quantization.lowest - 1)
        ) + quantization.lowest
    weights = codes.astype(np.float32) * scales[..., None].astype(np.float32)
    return weights.reshape(len(packed), -1)


def _blocks(weight: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    rows, columns = weight.shape
    if columns % size:
        weight = np.pad(weight, ((0, 0), (0, -columns % size)))
    return weight.reshape(rows, -1, size)
