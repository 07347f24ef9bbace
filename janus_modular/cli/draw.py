"""The command ``draw``: images from a prompt."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from janus_modular.cli.options import (
    AllowFailed,
    Device,
    Dtype,
    ModelArgument,
    Runtime,
    Sampler,
    Seed,
    Settings,
    Variant,
    check_output,
    collect_settings,
    finite,
)
from janus_modular.cli.terminal_images import image_encoder

if TYPE_CHECKING:
    from PIL import Image

    from janus_modular.janus import Janus


def draw(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Number of images.")] = 4,
    guidance: Annotated[
        float | None,
        typer.Option(callback=finite, help="Guidance scale; 1: no guidance. Default 5."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="0: always the most likely code. Default 1."),
    ] = None,
    seed: Seed = None,
    sampler: Sampler = None,
    extra_settings: Settings = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image that the prompt is about, to be changed say; may be repeated."),
    ] = None,
    image_form: Annotated[
        str | None,
        typer.Option(
            help="How --image is given: input (read, the default), encoded (as it is drawn), both (Janus-4o)."
        ),
    ] = None,
    begin_with: Annotated[
        Path | None, typer.Option(help="An image whose first codes stay: the rest is drawn anew.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=finite,
            help="Share of --begin-with that stays; default 0.5, the upper half.",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels; default: the model's own.")
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File of the image grid; single images get numbered names.")
    ] = Path("out.png"),
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per batch: more are faster and need more memory.")
    ] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Also show the images in the terminal.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of file names.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runtime: Runtime = None,
    variant: Variant = None,
    allow_failed: AllowFailed = False,
) -> None:
    """Draw images for a prompt: single files and a grid of all images.

    Example: janus-modular draw runs/demo/model "the digit seven" -n 8 -o sevens.png
    """
    from janus_modular.image_sizes import parse_size
    from janus_modular.janus import Janus

    if show and as_json:
        raise typer.BadParameter("found --show and --json, which both write to stdout; leave one out")
    parsed_size = parse_size(size) if size else None
    if image_form is not None and not image:
        raise typer.BadParameter("found --image-form without --image: it says how images are given")
    if keep is not None and begin_with is None:
        raise typer.BadParameter("found --keep without --begin-with: it says how much of that image stays")
    encode = image_encoder(sys.stdout, os.environ) if show else None  # checked before anything is drawn
    check_output(output)
    image_format(output)
    singles = [output.with_stem(f"{output.stem}-{i}") for i in range(n)] if n > 1 else [output]
    existing = [str(path) for path in dict.fromkeys([output, *singles]) if path.exists()]
    if existing and not force:
        more = " and others" if len(existing) > 3 else ""
        raise typer.BadParameter(
            f"{', '.join(existing[:3])}{more} would be replaced: name other files (-o), or use --force"
        )
    settings = collect_settings(
        {"guidance": guidance, "temperature": temperature, "seed": seed}, extra_settings
    )
    janus = Janus.from_pretrained(
        model, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
    ).use_samplers(image=sampler)
    if begin_with is not None:
        if "prefix" in settings:
            raise typer.BadParameter("found --begin-with and --set prefix=...; give one of them")
        [codes] = janus.encode_images(begin_with, size=parsed_size)
        settings["prefix"] = codes[: int(len(codes) * (0.5 if keep is None else keep))].tolist()
    image_options: dict[str, Any] = {
        "images": image or [],
        **({"image_form": image_form} if image_form else {}),
    }
    images = janus.draw(
        prompt, n, **image_options, size=parsed_size, batch_size=batch_size, progress=True, **settings
    )
    used = asdict(janus.image_settings(settings))
    options = model_options(
        janus, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
    )
    options |= {"sampler": sampler} if sampler else {}
    options |= {"image": [str(path) for path in image]} if image else {}
    options |= {"image-form": image_form} if image_form else {}
    options |= {"size": size} if size else {}
    numbers = used.get("numbers") or range(used["first"], used["first"] + n)
    files = {output: (images.grid(), n, used)}
    for path, single, number in zip(singles, images, numbers, strict=True):
        files[path] = (single, 1, used | {"numbers": None, "first": number})
    for path, (drawn, count, settings) in files.items():
        save_drawing(drawn, path, prompt=prompt, n=count, model=model, options=options, settings=settings)
        if not as_json:
            typer.echo(str(path))
    if encode:
        typer.echo(encode(images.grid()), nl=False)
    if as_json:
        record = {
            "prompt": prompt,
            "images": [
                {"file": str(path), "usage": asdict(usage)}
                for path, usage in zip(singles, images.usage, strict=True)
            ],
            "grid": str(output),
            "model": model,
            "settings": {name: value for name, value in used.items() if name != "numbers" or value},
            **({"input_images": options["image"]} if image else {}),
        }
        typer.echo(json.dumps(record))


def model_options(
    janus: Janus,
    *,
    device: str,
    dtype: str,
    runtime: str | None,
    variant: str | None,
    allow_failed: bool,
) -> dict[str, Any]:
    """Return the options of a command that opens a model again as it was opened; defaults are left out."""
    from janus_modular.protocols import VariantRuntime

    if isinstance(janus.runtime, VariantRuntime):
        variant = janus.runtime.variant  # images depend on its precision
    options = {"variant": variant, "runtime": runtime, "allow-failed": allow_failed or None}
    options |= {key: value for key, value in (("device", device), ("dtype", dtype)) if value != "auto"}
    return {name: value for name, value in options.items() if value is not None}


def save_drawing(
    image: Image.Image,
    path: Path,
    *,
    prompt: str,
    n: int,
    model: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Write an image, or a grid of ``n``; the text of a PNG says how it was drawn, with the command.

    Raises:
        ImageError: the file cannot be written, or its extension is of no image format.
    """
    command = command_line(model, prompt, n, path, options, settings)
    save(image, path, {"prompt": prompt, "model": model, **options, **settings, "command": command})


def command_line(
    model: str, prompt: str, n: int, output: Path, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
    """Return the command that draws an image again, into a file of the same name."""
    words = ["janus-modular", "draw", model, prompt, "-n", str(n)]
    for name, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if item is True else [f"--{name}", str(item)]
    for name, value in settings.items():
        if value is None or value == ():
            continue
        is_option = name in ("guidance", "temperature", "seed")
        words += [f"--{name}", str(value)] if is_option else ["--set", f"{name}={json.dumps(value)}"]
    return shlex.join([*words, "-o", output.name])


def image_format(path: Path) -> str:
    """Return Pillow's name of the format of a file's extension: ``PNG``.

    Raises:
        ImageError: the extension is of no format that can be written.
    """
    from PIL import Image

    from janus_modular.errors import ImageError

    format_name = Image.registered_extensions().get(path.suffix.lower(), "")
    try:  # some writers accept no RGB, or need another program
        Image.new("RGB", (8, 8)).save(BytesIO(), format_name)
        writable = True
    except Exception:
        writable = False
    if not writable:
        ending = f"ends in '{path.suffix}', which" if path.suffix else "has no ending: that"
        raise ImageError(f"{path} {ending} is no image format that can be written: name a .png or a .jpg")
    return format_name


def save(image: Image.Image, path: Path, metadata: dict[str, object]) -> None:
    """Write an image atomically; a PNG file holds ``metadata`` as text."""
    from PIL.PngImagePlugin import PngInfo

    from janus_modular.atomic_writes import atomic_replace
    from janus_modular.errors import ImageError
    from janus_modular.foreign import reason

    format_name = image_format(path)
    text = PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, str(value))
    try:
        with atomic_replace(path, error=ImageError) as temporary:
            image.save(temporary, format_name, **({"pnginfo": text} if format_name == "PNG" else {}))
    except ImageError:
        raise
    except Exception as error:  # a full disk, or a size that the format does not support
        raise ImageError(f"{path} could not be written: {reason(error)}") from error
