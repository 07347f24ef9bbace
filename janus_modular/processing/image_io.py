"""Opening any image as plain RGB, and turning arrays back into images.

The EXIF orientation is applied; of an animation the first frame counts;
transparency is composited over white; 16-bit greys are scaled to 8 bits, not clipped.
"""

from __future__ import annotations

import io
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from janus_modular.errors import ImageError
from janus_modular.foreign import foreign_errors, printable, reason

ImageSource = str | Path | bytes | Image.Image | np.ndarray

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (Pillow's own limit: a quarter GB of RGB)."""

MAX_SIDE = 500_000
"""Longer sides are refused: scaling them to a few hundred pixels takes gigabytes."""


def open_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Open a path, the bytes of a file, a PIL image or an array as an upright RGB image, fully decoded.

    Arrays are uint8: (H, W) in grey, (H, W, 3) in RGB or (H, W, 4) with transparency. ``formats``, as Pillow
    calls them: no decoder of another format is tried; None: all that Pillow has.

    Raises:
        ImageError: there is no image, or it is damaged, too large, or of a mode without defined colours.
    """
    if not isinstance(source, ImageSource):
        raise ImageError(
            f"found a {type(source).__name__}; expected an image: a path, the bytes of a file, a PIL image,"
            " or a numpy array (of a tensor: tensor.numpy())."
        )
    name = _name(source)
    with foreign_errors(name, ImageError, "Export it again, for example as PNG."), ExitStack() as files:
        return _rgb_of(source, name, max_pixels, formats, files)


def _rgb_of(
    source: ImageSource, name: str, max_pixels: int, formats: tuple[str, ...] | None, files: ExitStack
) -> Image.Image:
    """Return an image in RGB; ``files`` closes the file even if the decoder fails."""
    if isinstance(source, np.ndarray):
        source = _from_array(source, max_pixels)
    image = source if isinstance(source, Image.Image) else _open_header(source, name, formats, files)
    if _needs_other_program(image):
        raise ImageError(
            f"{name} is of the format {image.format}, for which Pillow starts another program; expected PNG,"
            " JPEG, WebP, GIF, TIFF or BMP. Export it as PNG."
        )
    width, height = image.size
    _check_size(name, width, height, max_pixels)
    if width == 0 or height == 0:
        raise ImageError(f"{name} is empty: {width} x {height} pixels. Give an image of at least 1 x 1.")
    try:
        if image is not source and getattr(image, "is_animated", False):
            image.seek(0)
        image.load()
        if image.getexif():
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise ImageError(
            f"{name} is damaged: {reason(error)}. Expected a complete {image.format or 'image'} file; "
            "fetch or export it again."
        ) from error
    return _rgb(image, name)


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height:,} pixels; at most {max_pixels:,} are read. "
            "Scale it down first, or raise max_pixels if you trust where it comes from."
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} has {width} x {height} pixels; at most {MAX_SIDE:,} are read on a side, since scaling it"
            " takes memory by its longer side. Scale it down first."
        )


def _from_array(array: NDArray[Any], max_pixels: int) -> Image.Image:
    """Return an array of pixels as an image; a view of many pixels may take little memory itself."""
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
        channels_first = array.ndim == 3 and array.shape[0] in (3, 4) and not fits
        hint = " Put the channels last: array.transpose(1, 2, 0)." if channels_first else ""
        hint += " Scale floats to 0..255, and convert: .astype('uint8')." if array.dtype != np.uint8 else ""
        raise ImageError(
            f"found an array {array.shape} of {array.dtype}; expected uint8, (H, W), (H, W, 3) or"
            f" (H, W, 4).{hint}"
        )
    height, width = array.shape[:2]
    _check_size(f"the array {array.shape}", width, height, max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _needs_other_program(image: Image.Image) -> bool:
    """Return True if Pillow would decode the file by another program: Ghostscript for EPS, a handler for WMF.

    An image that is decoded already needs none.
    """
    is_undecoded_eps = image.format == "EPS" and bool(getattr(image, "tile", None))
    return is_undecoded_eps or isinstance(image, ImageFile.StubImageFile)


def to_image(pixels: NDArray[Any], *, value_range: tuple[float, float] = (-1.0, 1.0)) -> Image.Image:
    """Turn pixels (3, H, W) into an image: uint8 as they are, floats from ``value_range``.

    Floats are scaled to 0..255, clipped and truncated, as the published code does.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"pixels must be (3, H, W), not {pixels.shape}")
    if pixels.dtype != np.uint8:
        low, high = value_range
        scaled = (pixels.astype(np.float32) - low) / (high - low) * 255
        pixels = np.clip(scaled, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))  # (H, W, 3)


def _name(source: ImageSource) -> str:
    """Return the name of an image in errors."""
    if isinstance(source, bytes):
        return f"the image ({len(source):,} bytes)"
    if isinstance(source, np.ndarray):
        return f"the array {source.shape}"
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", "")  # of images that were opened from files
        return f"the image '{printable(file, most=200)}'" if file else "the image"
    return f"the image '{printable(source, most=200)}'"


def _open_header(
    source: str | Path | bytes, name: str, formats: tuple[str, ...] | None, files: ExitStack
) -> Image.Image:
    """Read the file's header; pixels are decoded once the size has been checked."""
    expected = "PNG, JPEG, WebP, GIF, TIFF or BMP" if formats is None else ", ".join(formats)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(f"{name} is an address; images are read from files. Download it first.")
    if not isinstance(source, bytes) and not Path(source).is_file():
        state = "a folder" if Path(source).is_dir() else "not there"
        raise ImageError(f"{name} is {state}; expected an image file. Check the path.")
    try:
        with warnings.catch_warnings():  # the caller checks the size
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(
                io.BytesIO(source) if isinstance(source, bytes) else files.enter_context(open(source, "rb")),
                formats=formats,
            )
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} is too large to be read safely: {reason(error)}. Scale it down first."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image that can be read; expected {expected}. "
            "Check that the file is complete and is an image."
        ) from error
    except Exception as error:  # a header that is wrong
        raise ImageError(
            f"{name} cannot be opened: {reason(error)}. Export it again, for example as PNG."
        ) from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Return an image of any mode as RGB."""
    mode = image.mode
    if mode.startswith("I"):  # 16-bit greys, by themselves ("I;16") or in 32 bits ("I")
        values = np.asarray(image).astype(np.int64)  # (H, W)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name} holds whole numbers from {values.min()} to {values.max()}; expected 8 or 16 bits "
                "a pixel. Scale it to 0..255 first."
            )
        greys = ((values + 128) // 257).astype(np.uint8)
        greys[values == image.info.get("transparency", -1)] = 255  # transparent pixels are white
        return Image.fromarray(greys).convert("RGB")
    if mode in ("F", "LAB"):
        raise ImageError(
            f"{name} is of mode {mode}, whose colours have no fixed meaning here; expected 8 or 16 bits of "
            "grey, RGB or CMYK. Convert it first."
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")
