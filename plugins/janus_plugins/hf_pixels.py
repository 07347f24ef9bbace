"""Reads how images are preprocessed from transformers' processor files."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_modular import CheckpointError, DescriptionError, Difference, PixelSpec

log = logging.getLogger(__name__)

UNSUPPORTED = {
    "do_flip_channel_order": "false: channels in the order RGB",
    "do_convert_grayscale": "false: images in colour",
    "do_grayscale": "false: images in colour",
    "rescale_offset": "false: pixels between 0 and 1",
}
"""Steps of processors that change pixels, and what is supported instead."""

TILED = {"do_image_splitting", "do_pan_and_scan", "image_grid_pinpoints"}
"""Keys of processors that cut an image into tiles, which they pad; each tile has the encoder's own size."""

NEAREST = 0
"""The value of ``resample`` that changes images visibly; all others interpolate, here bicubic."""


def check_pixels(pixels: PixelSpec, described: Mapping[str, Any], folder: Path | None) -> None:
    """Check the normalisation in ``pixels`` against the folder's processor file; sizes may differ.

    Another way to resize is logged as a warning: Janus fits images inside a square, whatever the encoder.
    Defaults of PixelSpec are checked like written values.

    Raises:
        DescriptionError: names the settings that differ.
    """
    differences = [
        Difference(f"pixels.{key}", getattr(pixels, key), described[key])
        for key in ("normalize", "mean", "std")
        if key in described and getattr(pixels, key) != described[key]
    ]
    if differences:
        raise DescriptionError(f"{folder}", differences, drop="pixels")
    if described.get("resize", pixels.resize) != pixels.resize:
        log.warning(
            "pixels.resize is %s; %s has images resized by %s. To do so here, write pixels.resize=%s",
            pixels.resize,
            folder,
            described["resize"],
            described["resize"],
        )


def processor_settings(folder: Path | None) -> dict[str, Any]:
    """Return PixelSpec's fields from transformers' processor files; {} if there are none.

    Raises:
        CheckpointError: a file is damaged, or has a rescale_factor that is not supported.
    """
    settings: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if folder is not None and (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text("utf-8"))
                settings = content.get("image_processor") or content
            except (ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{folder / name} is no processor's settings: {error}. Fetch it again."
                ) from error
    try:
        return _pixel_settings(settings, folder)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{folder}: its processor's file does not say how pixels are treated:"
            f" {' '.join(str(error).split()).rstrip('.')}. Expected"
            " image_mean and image_std of three numbers each, and sizes in pixels: fetch it again, or set it"
            " right."
        ) from error


def _pixel_settings(settings: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    if wrong := _unsupported(settings):
        raise CheckpointError(
            f"{folder}: its processor treats pixels in an unsupported way: {'; '.join(wrong)}."
            " If the weights do not need it, change the file."
        )
    if settings.get("image_mean") is None and settings.get("image_std") is None:
        return {}
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):  # files round it
        raise CheckpointError(
            f"{folder}: its processor multiplies pixels by {factor}; expected 1/255 (0..255 to 0..1)"
        )
    crop = settings.get("do_center_crop", False)
    size = settings.get("crop_size" if crop else "size")
    spec: dict[str, Any] = {
        "resize": "crop" if crop else "stretch",
        "normalize": settings.get("do_normalize", True),
        "mean": tuple(settings["image_mean"]),
        "std": tuple(settings["image_std"]),
    }
    if _is_janus(settings) and settings.get("do_pad", True):
        spec["resize"] = "letterbox"
        if settings.get("background_color") is not None:
            spec["fill"] = tuple(settings["background_color"])
    if (patches := settings.get("max_num_patches")) is not None:  # SigLIP 2 NaFlex
        spec |= _native_size(patches, settings["patch_size"])
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if size is not None:
        spec["height"], spec["width"] = pair(size)
    PixelSpec(**spec)  # checks the values
    return spec


def _native_size(patches: int, side: int) -> dict[str, Any]:
    """Return PixelSpec's fields for images in native sizes, of up to so many patches of ``side`` pixels."""
    rows = next(rows for rows in range(math.isqrt(patches), 0, -1) if patches % rows == 0)
    return {"resize": "native", "multiple": side, "height": rows * side, "width": patches // rows * side}


def _unsupported(settings: Mapping[str, Any]) -> list[str]:
    """Return an error text for each setting that gives other pixels than a PixelSpec can."""
    wrong = [f"{key} is true; expected {usual}" for key, usual in UNSUPPORTED.items() if settings.get(key)]
    if settings.get("resample") == NEAREST and settings.get("do_resize", True):
        wrong.append("resample is 0 (nearest); expected 2 or 3 (bilinear, bicubic)")
    if settings.keys() & TILED:
        return wrong
    if settings.get("do_pad") and not _is_janus(settings):
        wrong.append("do_pad is true; expected false: images are resized to the encoder's size")
    size = settings.get("size")
    edges = isinstance(size, Mapping) and "height" not in size
    if edges and not settings.get("do_center_crop") and settings.get("do_resize", True):
        wrong.append(f"size is {size}; expected height and width, or a do_center_crop: sizes are fixed")
    return wrong


def _is_janus(settings: Mapping[str, Any]) -> bool:
    """Return True for the processor of Janus, which fits images inside a square of the background colour."""
    return str(settings.get("image_processor_type")).startswith("Janus")


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return a size in transformers' notation as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
