"""Images of records: files inside a folder, or data inside the record."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from PIL import Image

from janus_modular import DataError, open_image
from janus_plugins.records.fields import BRIEF, Fields, text_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Suffixes of images, in lower case; names in capitals have them too."""

MAX_DATA_URI = 64 * 2**20
"""Longest data URI, in characters: 48 MiB of image file."""

MAX_NESTING = 2
"""Objects around a reference, as in ``{"image_url": {"url": FILE}}``, without the key of the content part."""

REFERENCES = ("image", "image_url", "url", "path")
"""Keys of an object whose value is an image: a path, a URI, or such an object again."""


class ImageOpener(Protocol):
    """Opens the images to which records refer, wherever these are stored."""

    def open(self, reference: Any, where: str) -> Image.Image:
        """Return the image of a reference; ``where`` is the reference's path in the record, for errors."""
        ...


@dataclass(frozen=True)
class ImageFolder:
    """Opens the images to which records refer."""

    folder: Path
    outside: bool = False  # allow files outside the folder

    def open(self, reference: Any, where: str) -> Image.Image:
        """Return the image of a path, of a ``file:`` or ``data:`` URI, of bytes, or of an object of these.

        Raises:
            DataError: the reference is of another form, or leads out of the folder or to the network.
            ImageError: the image is missing, damaged or too large.
        """
        for _ in range(MAX_NESTING):
            if isinstance(reference, dict):
                reference = _reference_in(reference, where)
        if isinstance(reference, bytes):
            return open_image(reference)
        name = text_of(reference, where)
        scheme = (re.match(r"(data):|([a-z][a-z0-9+.-]+)://", name, re.IGNORECASE) or [""])[0].lower()
        if scheme == "data:":
            return open_image(_data(name, where))
        if scheme == "file://":
            return open_image(self._inside(_file(name, where), where))
        if scheme:
            raise DataError(
                f"{where}: '{_short(name)}' is an address; training reads no network, so that it can be"
                " repeated. Download the images, and write their paths."
            )
        return open_image(self._inside(name, where))

    def _inside(self, name: str, where: str) -> Path:
        """Return the path of a file, which is in the folder unless ``outside`` allows others."""
        path = self.folder / name
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
            path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # NUL, a name too long, a loop of links
            raise DataError(f"{where}: '{_short(name)}' cannot be a path: {error!s:.400}.") from error
        if not self.outside and not inside:
            raise DataError(
                f"{where}: the image '{_short(name)}' lies outside {self.folder}: move it there, or set"
                " outside: true."
            )
        return path


def _reference_in(reference: dict[str, Any], where: str) -> Any:
    """Return the reference in an object such as ``{"url": ...}`` or ``{"bytes": null, "path": ...}``."""
    fields = Fields(reference, where, ignore=("detail",))
    inner = fields.take(*REFERENCES)
    content = fields.take("bytes")
    if isinstance(content, bytes):  # of a table; in JSON, bytes are text of an unknown encoding
        return content
    if content is not None:
        raise DataError(
            f"{where}: has the image's bytes, whose encoding is unknown. Write them as a data URI,"
            " data:image/png;base64,..., or save the image as a file."
        )
    fields.close()
    if inner is None:
        raise DataError(f"{where}: found {BRIEF.repr(reference)}; expected one of {', '.join(REFERENCES)}.")
    return inner


def _file(uri: str, where: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise DataError(
            f"{where}: '{_short(uri)}' names no file of this machine; expected file:///FOLDER/NAME, with"
            " special characters as %XX."
        )
    return unquote(parts.path)


def _data(uri: str, where: str) -> bytes:
    if len(uri) > MAX_DATA_URI:
        raise DataError(
            f"{where}: a data URI of {len(uri):,} characters; at most {MAX_DATA_URI:,} are read. Save the"
            " image as a file."
        )
    head, comma, body = uri.partition(",")
    if not comma or not re.fullmatch(r"data:image/[\w.+-]+(;[\w-]+=[\w.-]+)*;base64", head, re.IGNORECASE):
        raise DataError(f"{where}: found '{_short(uri)}'; expected data:image/TYPE;base64,DATA.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the data URI is not base64: {error!s:.400}.") from error


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:100]}... ({len(name):,} characters)"
