"""Shows images in terminals: by the protocols of kitty and iTerm2, or as half blocks in 24-bit colour.

- kitty's graphics protocol: PNG data in base64, in escape codes of at most 4096 characters
- iTerm2's inline images: PNG data in base64, in one escape code
- half blocks: a character for two pixels, the upper in the foreground's colour, the lower in the background's
"""

from __future__ import annotations

import shutil
from base64 import b64encode
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, TextIO

from janus_modular.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

Encoder = Callable[["Image.Image"], str]
"""Returns the characters that a terminal shows as the image, with a line end behind it."""

CHUNK = 4096  # characters of base64 in an escape code of kitty's protocol
SMALLEST = 256  # pixels of the longer side: smaller images are shown enlarged


def image_encoder(stream: TextIO, environment: Mapping[str, str]) -> Encoder:
    """Return the encoder for the terminal that ``stream`` writes to, as the environment describes it.

    Terminal multiplexers do not pass images on: inside them, half blocks are used.

    Raises:
        ImageError: the stream is no terminal, or the terminal can show neither images nor 24-bit colour.
    """
    if not stream.isatty():
        raise ImageError(
            "--show: found an output that is no terminal but a file or a pipe; expected a terminal."
            " Leave --show out: drawn images are in files, too."
        )
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    is_multiplexer = "TMUX" in environment or terminal.startswith(("screen", "tmux"))
    if not is_multiplexer and program in ("iTerm.app", "WezTerm"):
        return encode_iterm2
    if not is_multiplexer and (
        "KITTY_WINDOW_ID" in environment or terminal in ("xterm-kitty", "xterm-ghostty")
    ):
        return encode_kitty
    if environment.get("COLORTERM") in ("truecolor", "24bit") and "utf" in (stream.encoding or "").lower():
        return encode_half_blocks
    raise ImageError(
        f"--show: found a terminal (TERM={terminal}) that is not known to show images; expected kitty,"
        " Ghostty, WezTerm, iTerm2, or 24-bit colour with UTF-8. If yours has 24-bit colour:"
        " export COLORTERM=truecolor. Otherwise leave --show out: drawn images are in files, too."
    )


def encode_kitty(image: Image.Image) -> str:
    """Encode an image by kitty's graphics protocol; the terminal sends no response (``q=2``)."""
    payload = b64encode(_png(image)).decode()
    chunks = [payload[start : start + CHUNK] for start in range(0, len(payload), CHUNK)]
    keys = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]
    more = [*[1] * (len(chunks) - 1), 0]
    codes = zip(keys, more, chunks, strict=True)
    return "".join(f"\x1b_G{key}m={m};{chunk}\x1b\\" for key, m, chunk in codes) + "\n"


def encode_iterm2(image: Image.Image) -> str:
    """Encode an image by iTerm2's protocol of inline images."""
    png = _png(image)
    return f"\x1b]1337;File=inline=1;size={len(png)}:{b64encode(png).decode()}\a\n"


def encode_half_blocks(image: Image.Image) -> str:
    """Encode an image as coloured half blocks, reduced to the width of the terminal."""
    import numpy as np

    width = min(image.width, shutil.get_terminal_size().columns)
    height = 2 * max(1, round(image.height * width / image.width / 2))
    pixels = np.asarray(image.convert("RGB").resize((width, height))).tolist()
    lines = [
        "".join(
            f"\x1b[38;2;{';'.join(map(str, upper))};48;2;{';'.join(map(str, lower))}m\u2580"
            for upper, lower in zip(*rows, strict=True)
        )
        for rows in zip(pixels[::2], pixels[1::2], strict=True)
    ]
    return "".join(f"{line}\x1b[0m\n" for line in lines)


def _png(image: Image.Image) -> bytes:
    """Return an image as a PNG file; a small image enlarged by a whole factor, without smoothing."""
    from PIL import Image

    factor = max(1, SMALLEST // max(image.size))
    size = (image.width * factor, image.height * factor)
    file = BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()
