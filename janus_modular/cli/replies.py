"""Writes replies with images: texts to the terminal as they come, images into files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from janus_modular.cli.draw import save

if TYPE_CHECKING:
    from janus_modular.cli.terminal_images import Encoder
    from janus_modular.interleaved import ReplyStream


def write_reply(
    replies: ReplyStream, *, quiet: bool = False, encode: Encoder | None = None
) -> list[dict[str, str]]:
    """Print a reply while it is generated, each image as the name of its new file; return its parts.

    ``quiet`` prints nothing; ``encode`` shows the images, too.
    """
    files, at_start = list[Path](), True  # at_start: of a text, whose first whitespace is left out
    for part in replies:
        if isinstance(part, str):
            text = part.lstrip() if at_start else part
            at_start = at_start and not text
            if not quiet:
                typer.echo(text, nl=False)
            continue
        path = next_drawing()
        save(part, path, {})
        files.append(path)
        if not quiet:
            typer.echo(f"{'' if at_start else chr(10)}[{path}]")
            if encode:
                typer.echo(encode(part), nl=False)
        at_start = True
    if not quiet:
        if not at_start:
            typer.echo()
        warn_if_cut(replies)
    names = iter(files)
    return [
        {"text": part} if isinstance(part, str) else {"image": str(next(names))}
        for part in replies.reply.parts
    ]


def next_drawing() -> Path:
    """Return the first of drawing-1.png, drawing-2.png, ... that is not in this folder yet."""
    number = 1
    while (path := Path(f"drawing-{number}.png")).exists():
        number += 1
    return path


def warn_if_cut(replies: ReplyStream) -> None:
    """Print a note on stderr if a reply was cut, with the limit that cut it."""
    notes = {
        "length": "at max_tokens; raise --max-tokens for a longer reply",
        "context": "where the model's context ends; shorten the conversation",
        "image": "before an image; raise --max-images for more",
    }
    if note := notes.get(replies.reply.finish_reason or ""):
        typer.echo(f"note: the reply was cut {note}", err=True)
