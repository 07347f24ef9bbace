"""Quantised checkpoints: recognised by what lies beside the weights, and refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from janus_modular.errors import CheckpointError

CONFIG_KEYS = ("quantization_config", "compression_config")
"""Keys of a config.json, at any depth, under which transformers describes quantised weights."""

FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quantization_config.json": "quanto",
}
"""Files that quantisers write beside the weights, where config.json itself says nothing."""


def refuse_quantized(path: Path) -> None:
    """Refuse a folder whose weights are quantised; a single file, or a folder without a description, passes.

    Quantised layers are none that can be trained, saved under the model's own config, or exported.

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
        return  # whoever reads the config reports what is wrong with it
    for key, description in quantization_in(config):
        _refuse(path, method_of(description), f"{key} in config.json")


def quantization_in(config: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each description of a quantisation in a config's mappings, with its path (``text_config.…``)."""
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        where = f"{path}.{key}" if path else str(key)
        if key in CONFIG_KEYS and (value or value == {}):  # transformers takes the key for the fact
            yield where, value if isinstance(value, Mapping) else {"quant_method": str(value)}
        else:
            yield from quantization_in(value, where)


def method_of(description: Mapping[str, Any]) -> str:
    """Name the method of a description; files of bitsandbytes' first versions do not name theirs."""
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
