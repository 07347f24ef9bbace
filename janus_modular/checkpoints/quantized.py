"""Detects quantised checkpoints by the files beside their weights, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from janus_modular.errors import CheckpointError

CONFIG_KEYS = {"quantization_config": "", "compression_config": "", "quantization": "mlx"}
"""Keys of a config.json, at any depth, that describe quantised weights, with the method where none is named.

transformers writes the first two, and MLX the last.
"""

FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quantization_config.json": "quanto",
}
"""Files that quantisers write beside the weights, where config.json itself says nothing."""


def refuse_quantized(path: Path) -> None:
    """Raise an error for a folder whose config says that its weights are quantised; all others pass.

    Quantised layers can be neither trained, nor saved under the model's own config, nor exported.

    Raises:
        CheckpointError: names the method, where it is described, and what to do.
    """
    if not path.is_dir():
        return
    for name, method in FILES.items():
        if (path / name).is_file():
            _refuse(path, method, name)
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return  # reading the config reports it
    for key, description in quantization_in(config):
        _refuse(path, method_of(description), f"{key} in config.json")


def quantization_in(config: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each description of a quantisation in a config's mappings, with its path (``text_config.…``)."""
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        key_path = f"{path}.{key}" if path else str(key)
        if key in CONFIG_KEYS and (value or value == {}):  # for transformers the key alone means quantised
            description = value if isinstance(value, Mapping) else {"quant_method": str(value)}
            yield key_path, {"quant_method": CONFIG_KEYS[key], **description}
        else:
            yield from quantization_in(value, key_path)


def method_of(description: Mapping[str, Any]) -> str:
    """Return the method of a description; the first versions of bitsandbytes do not name it."""
    method = str(description.get("quant_method") or "").removeprefix("QuantizationMethod.").lower()
    if description.get("load_in_4bit") or description.get("_load_in_4bit"):
        return "bitsandbytes (4-bit)"
    if description.get("load_in_8bit") or description.get("_load_in_8bit"):
        return "bitsandbytes (8-bit)"
    return method or "a method that is not named"


def _refuse(path: Path, method: str, where: str) -> None:
    raise CheckpointError(
        f"{path} holds weights quantised by {method} ({where}); expected plain floating-point weights, which"
        " can be trained, adapted, saved and exported. Name the folder that it was quantised from, or"
        " dequantise it first: with transformers and the method's own package, model.dequantize() and"
        " model.save_pretrained(FOLDER)."
    )
