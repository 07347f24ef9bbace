"""``draw``: images from words."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from janus_modular.cli.options import (
    AllowFailed,
    Device,
    Dtype,
    ModelArgument,
    Runtime,
    Seed,
    Settings,
    Variant,
    check_output,
    finite,
    settings_of,
)

if TYPE_CHECKING:
    from PIL import Image


def draw(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 4,
    guidance: Annotated[
        float | None,
        typer.Option(callback=finite, help="How strongly the prompt counts; 1: no further. Left out: 5."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="0: always the likeliest code. Left out: 1."),
    ] = None,
    seed: Seed = None,
    others: Settings = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Of the grid; single files get numbers.")
    ] = Path("out.png"),
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once: memory against speed.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, not the files' names.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runtime: Runtime = None,
    variant: Variant = None,
    allow_failed: AllowFailed = False,
) -> None:
    """Draw images of a prompt: single files and a grid of them all."""
    from rich.console import Console
    from rich.progress import Progress

    from janus_modular.janus import Janus

    check_output(output)  # before anything is drawn
    image_format(output)
    settings = settings_of({"guidance": guidance, "temperature": temperature, "seed": seed}, others)
    janus = Janus.from_pretrained(
        model, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
    )
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("drawing", total=None)
        images = janus.draw(
            prompt,
            n,
            batch_size=batch_size,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
            **settings,
        )
    used = asdict(janus.image_settings(settings))
    form = getattr(janus.runtime, "variant", variant)  # of a bundle: its numbers differ, and so its images
    about = {"prompt": prompt, "model": model, **({"variant": form} if form else {}), **used}
    singles = [output.with_stem(f"{output.stem}-{i}") for i in range(n)] if n > 1 else [output]
    for path, image in ({output: grid(images)} | dict(zip(singles, images, strict=True))).items():
        save(image, path, about)
        if not as_json:
            typer.echo(str(path))
    if as_json:
        record = {
            "prompt": prompt,
            "images": [
                {"file": str(path), "usage": asdict(usage)}
                for path, usage in zip(singles, images.usage, strict=True)
            ],
            "grid": str(output),
            "model": model,
            "settings": used,
        }
        typer.echo(json.dumps(record))


def grid(images: list[Image.Image], gap: int = 4) -> Image.Image:
    """Lay images of one size out as near to a square as they go, ``gap`` white pixels between."""
    from PIL import Image

    columns = int(len(images) ** 0.5 + 0.999)
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def image_format(path: Path) -> str:
    """Return Pillow's name of the format that a file's ending means: ``PNG``.

    Raises:
        ImageError: none that can be written.
    """
    from PIL import Image

    from janus_modular.errors import ImageError

    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    try:  # some formats have a writer that takes no RGB, or needs another program
        Image.new("RGB", (8, 8)).save(BytesIO(), kind)
        writable = True
    except Exception:
        writable = False
    if not writable:
        found = f"ends in '{path.suffix}', which" if path.suffix else "has no ending: that"
        raise ImageError(f"{path} {found} is no image format that can be written: name a .png or a .jpg")
    return kind


def save(image: Image.Image, path: Path, about: dict[str, object]) -> None:
    """Write an image aside and rename it; a PNG says in its text how it was made."""
    from PIL.PngImagePlugin import PngInfo

    from janus_modular.atomic_writes import atomic_replace
    from janus_modular.errors import ImageError
    from janus_modular.foreign import reason

    kind = image_format(path)
    notes = PngInfo()
    for key, value in about.items():
        notes.add_itxt(key, str(value))
    try:
        with atomic_replace(path, error=ImageError) as aside:
            image.save(aside, kind, **({"pnginfo": notes} if kind == "PNG" else {}))
    except ImageError:
        raise
    except Exception as error:  # a full disk, or a size that the format does not hold
        raise ImageError(f"{path} could not be written: {reason(error)}") from error
