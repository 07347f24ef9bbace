"""Shared by the published and the transformers format: pixel settings, the prompt format, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_modular import CheckpointError, read_json

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
"""The default of both implementations; released files state theirs."""

ROLES = {"<|User|>", "<|Assistant|>"}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON object."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def require(condition: bool, format_name: str, expected: str, actual: object) -> None:
    """Raise CheckpointError unless the condition for a conversion from or to a format holds."""
    if not condition:
        raise CheckpointError(f"the {format_name} format supports only {expected}; found {actual!r}.")


def require_begin_image(tokens: Mapping[str, Any], format_name: str) -> None:
    """Raise CheckpointError for a tokenizer whose images begin without a token."""
    begin = tokens["begin_image"]
    require(begin is not None, format_name, "images that begin with a token (tokens.begin_image)", begin)


def read_pixels(file: Mapping[str, Any], tower: Mapping[str, Any]) -> dict[str, Any]:
    """Read a preprocessor's settings as a native pixel spec.

    ``tower``: a published tower may normalise once more, by ``pixel_mean`` and ``pixel_std``:
    ((x - m) / s - M) / S = (x - (m + s M)) / (s S).
    """
    size = file.get("image_size") or file.get("size", 384)
    height, width = (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)
    mean, std = file.get("image_mean") or CLIP_MEAN, file.get("image_std") or CLIP_STD
    fill = file.get("background_color") or [int(255 * m) for m in mean]
    normalize = file.get("do_normalize", True)
    if tower.get("pixel_mean") and tower.get("pixel_std"):
        m, s = (mean, std) if normalize else ([0.0] * 3, [1.0] * 3)
        mean = [a + b * c for a, b, c in zip(m, s, tower["pixel_mean"], strict=True)]
        std = [a * b for a, b in zip(s, tower["pixel_std"], strict=True)]
        normalize = True
    return {
        "height": height,
        "width": width,
        "resize": "letterbox",
        "normalize": normalize,
        "mean": list(mean),
        "std": list(std),
        "fill": list(fill),
        "min_size": file.get("min_size", 14),
    }


def write_pixels(pixels: Mapping[str, Any], format_name: str) -> dict[str, Any]:
    """Return the keys that both formats write for a native pixel spec; each adds the image's size."""
    fill = [int(255 * m) for m in pixels["mean"]]
    require(
        pixels["height"] == pixels["width"],
        format_name,
        "square images",
        f"{pixels['height']}x{pixels['width']}",
    )
    require(pixels["resize"] == "letterbox", format_name, "letterboxed images", pixels["resize"])
    require(
        pixels["fill"] in (None, fill), format_name, f"borders of int(255 * mean), {fill}", pixels["fill"]
    )
    return {
        "min_size": pixels["min_size"],
        "image_mean": pixels["mean"],
        "image_std": pixels["std"],
        "rescale_factor": 1 / 255,
        "do_normalize": pixels["normalize"],
        "background_color": fill,
    }


def choose_template(folder: Path, preprocessor: Mapping[str, Any]) -> str:
    """Return the prompt format of Janus-Pro or Janus-1.3B, which their files do not name.

    Janus-Pro's tokenizer has tokens for the roles, and its images are normalised; Janus-1.3B's are not. For
    other checkpoints override ``processor.template``.
    """
    tokens = token_ids(folder)
    return "janus-pro" if tokens.keys() >= ROLES and preprocessor.get("do_normalize", True) else "janus"


def token_ids(folder: Path) -> dict[str, int]:
    """Return the ids of the tokens that were added to a tokenizer.json, by their strings."""
    if not (folder / "tokenizer.json").exists():
        return {}
    added = read_json(folder / "tokenizer.json", CheckpointError).get("added_tokens") or []
    return {token["content"]: token["id"] for token in added}
