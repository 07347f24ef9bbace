"""From images to the model's pixels: one transform for image inputs, another for image targets.

Both return uint8; normalisation happens inside the model. They differ on purpose: an image input is whole
(letterbox), and an image target fills its frame, so that the model never learns to draw borders.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_modular.interfaces import PixelSpec

BICUBIC = Image.Resampling.BICUBIC  # Pillow's always filters over the whole footprint ("antialias")


def understanding_pixels(image: Image.Image, spec: PixelSpec) -> NDArray[np.uint8]:
    """Return the pixels (3, spec.height, spec.width) of an image input in RGB."""
    if spec.resize == "letterbox":
        return _channels_first(_letterbox(image, spec))
    if spec.resize == "crop":
        return _channels_first(_cover(image, spec.height, spec.width))
    if spec.resize == "stretch":
        return _channels_first(image.resize((spec.width, spec.height), BICUBIC))
    raise ValueError(f"resize must be letterbox, crop or stretch, not {spec.resize!r}")


def generation_pixels(image: Image.Image, *, height: int, width: int) -> NDArray[np.uint8]:
    """Return the pixels (3, height, width) of an image target in RGB: scaled to cover, then cropped."""
    return _channels_first(_cover(image, height, width))


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))  # (3, H, W)


def _letterbox(image: Image.Image, spec: PixelSpec) -> Image.Image:
    """Return the whole image in the frame, centred; sizes are truncated, as in the published code."""
    w, h = image.size
    side, frame = (w, spec.width) if w * spec.height >= h * spec.width else (h, spec.height)
    size = (
        max(int(w / side * frame), min(spec.min_size, spec.width)),
        max(int(h / side * frame), min(spec.min_size, spec.height)),
    )
    fill = spec.fill or tuple(int(255 * m) for m in spec.mean)
    canvas = Image.new("RGB", (spec.width, spec.height), fill)
    canvas.paste(image.resize(size, BICUBIC), ((spec.width - size[0]) // 2, (spec.height - size[1]) // 2))
    return canvas


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return the image scaled to cover the frame, and cropped at the centre.

    Resizing only the box that remains gives the pixels of "resize, then crop" without the memory of the
    long side: an image of 10 x 20,000 would become one of 384 x 768,000.
    """
    w, h = image.size
    if w * height >= h * width:  # too wide: the height decides
        scaled_width, scaled_height = max(int(height * w / h), width), height
    else:
        scaled_width, scaled_height = width, max(int(width * h / w), height)
    x, y = (scaled_width - width) // 2, (scaled_height - height) // 2
    sx, sy = w / scaled_width, h / scaled_height
    box = (x * sx, y * sy, min((x + width) * sx, w), min((y + height) * sy, h))
    return image.resize((width, height), BICUBIC, box=box)
