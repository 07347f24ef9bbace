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
    """Return the pixels (3, H, W) of an RGB image, whole, in the spec's size or, native, in its own."""
    if spec.resize == "letterbox":
        return _channels_first(_letterbox(image, spec))
    if spec.resize == "crop":
        return _channels_first(_cover(image, spec.height, spec.width))
    if spec.resize in ("stretch", "tiles"):
        return _channels_first(image.resize((spec.width, spec.height), BICUBIC))
    if spec.resize == "native":
        height, width = native_size(image.height, image.width, spec)
        return _channels_first(image.resize((width, height), BICUBIC))
    raise ValueError(f"resize must be letterbox, crop, stretch, native or tiles, not {spec.resize!r}")


def encoder_inputs(image: Image.Image, spec: PixelSpec) -> list[NDArray[np.uint8]]:
    """Return what the encoder reads of an image input in RGB, each (3, H, W): the image, or tiles and it."""
    whole = understanding_pixels(image, spec)
    rows, columns = tile_grid(image.height, image.width, spec)
    if rows * columns == 1:
        return [whole]
    canvas = image.resize((columns * spec.width, rows * spec.height), BICUBIC)
    corners = [(x * spec.width, y * spec.height) for y in range(rows) for x in range(columns)]
    tiles = [canvas.crop((x, y, x + spec.width, y + spec.height)) for x, y in corners]
    return [*map(_channels_first, tiles), whole]


def tile_grid(height: int, width: int, spec: PixelSpec) -> tuple[int, int]:
    """Return into how many rows and columns of tiles an image is cut; (1, 1) without tiles.

    The rule is InternVL 1.5's ("How far are we to GPT-4V?", section 3.2): of all grids of up to ``max_tiles``
    tiles, that whose aspect ratio is nearest; of equal ones the larger, if the image has more than half of
    its pixels. InternVL also reads the whole image last.
    """
    most = spec.max_tiles or 1
    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    best, nearest = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[1])):
        distance = abs(width / height - columns * spec.width / (rows * spec.height))
        is_filled = width * height > 0.5 * rows * columns * spec.width * spec.height
        if distance < nearest or (distance == nearest and is_filled):
            best, nearest = (rows, columns), distance
    return best


def native_size(height: int, width: int, spec: PixelSpec) -> tuple[int, int]:
    """Return the size (height, width) in which an image is read that keeps its aspect ratio.

    It is the largest by the rule of NaFlex ("SigLIP 2", section 2.4.2): both sides are scaled alike, then
    rounded up to multiples of ``spec.multiple``, with an area of ``spec.height`` x ``spec.width`` at most.
    The scale is exact here, a fraction at which one side is a multiple.
    """
    multiple = spec.multiple or 1
    most = (spec.height // multiple) * (spec.width // multiple)
    rows, columns = 1, 1
    for side, across, is_height in ((height, width, True), (width, height, False)):
        count = _largest_count(side, across, most)
        if not count:
            continue
        count_across = -(-across * count // side)
        candidate = (count, count_across) if is_height else (count_across, count)
        if candidate[0] * candidate[1] > rows * columns:
            rows, columns = candidate
    return rows * multiple, columns * multiple


def _largest_count(side: int, across: int, most: int) -> int:
    """Return the largest k for which k times ceil(k across / side) is at most ``most``; 0 for none."""
    low, high = 0, most
    while low < high:
        count = (low + high + 1) // 2
        if count * -(-across * count // side) <= most:
            low = count
        else:
            high = count - 1
    return low


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
