"""The command ``chat``: questions about images, once or in a conversation."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    collect_settings,
    finite,
)
from janus_modular.errors import JanusError

if TYPE_CHECKING:
    from janus_modular.answers import Answer
    from janus_modular.janus import Janus
    from janus_modular.sequence import Message, Segment

HELP = "/image FILE adds an image to your next message, /reset starts again, /quit (or Ctrl-D) ends."


def chat(
    model: ModelArgument,
    question: Annotated[str | None, typer.Argument(help="Default: a conversation in the terminal.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image to ask about; may be repeated.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; default 512.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="0, the default: always the most likely token."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Sample from the k most likely tokens; 0, the default: from all."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, callback=finite, help="Sample from the smallest set of probability p; default 1."
        ),
    ] = None,
    seed: Seed = None,
    extra_settings: Settings = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this string; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; default: the model's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runtime: Runtime = None,
    variant: Variant = None,
    allow_failed: AllowFailed = False,
) -> None:
    """Ask a model questions, with or without images."""
    from janus_modular.janus import Janus
    from janus_modular.processing.image_io import open_image
    from janus_modular.sequence import ImageInput, Message, Text

    if as_json and question is None:
        raise typer.BadParameter("--json needs a question")
    images = [ImageInput(open_image(path)) for path in image or []]
    named = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    settings = collect_settings(named, extra_settings)
    janus = Janus.from_pretrained(
        model, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
    )
    janus.text_settings(settings)
    history = [] if system is None else [Message("system", [Text(system)])]
    if question is None:
        converse(janus, history, list(images), stop=stop or [], **settings)
        return
    messages = [*history, Message("user", [*images, Text(question)])]
    if as_json:
        answer = janus.chat(messages, stop=stop or [], **settings)
        names = [str(path) for path in image or []]
        used = asdict(janus.text_settings(settings))
        record = {
            "answer": answer,
            "finish_reason": answer.finish_reason,
            "usage": asdict(answer.usage),
            "model": model,
            "images": names,
            "settings": used,
        }
        typer.echo(json.dumps(record))
        return
    print_answer(janus, messages, stop=stop or [], **settings)


def print_answer(janus: Janus, messages: list[Message], **settings: Any) -> Answer:
    """Print an answer while it is generated; return the whole answer."""
    started = False
    stream = janus.chat(messages, stream=True, **settings)
    for text in stream:
        text = text if started else text.lstrip()
        started = started or bool(text)
        typer.echo(text, nl=False)
    typer.echo()
    warn_if_cut(stream.answer)
    return stream.answer


def warn_if_cut(answer: Answer) -> None:
    """Print a note on stderr if an answer was cut, with the limit that cut it."""
    if not answer.was_cut:
        return
    usage = answer.usage
    limit = {
        "length": f"at max_tokens, {usage.completion_tokens}; raise --max-tokens for a longer answer",
        "context": f"where the model's context ends, {usage.total_tokens} positions; shorten the prompt",
    }[answer.finish_reason or ""]
    typer.echo(f"note: the answer was cut {limit}", err=True)


def converse(janus: Janus, history: list[Message], images: list[Segment], **settings: Any) -> None:
    """Answer messages until the user quits; ``images`` belong to the next message."""
    from janus_modular.processing.image_io import open_image
    from janus_modular.sequence import ImageInput, Message, Text

    start = list(history)
    typer.echo(HELP, err=True)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                history, images = list(start), []
            elif command == "/image":
                images.append(ImageInput(open_image(Path(rest.strip()))))
            elif command.startswith("/"):
                typer.echo(HELP, err=True)
            elif line:
                messages = [*history, Message("user", [*images, Text(line)])]
                answer = print_answer(janus, messages, **settings)
                history, images = [*messages, Message("assistant", [Text(answer)])], []
        except JanusError as error:  # the conversation continues unchanged
            typer.echo(str(error), err=True)
