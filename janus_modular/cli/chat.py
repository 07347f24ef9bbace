"""The command ``chat``: questions about images, once or in a conversation."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from janus_modular.cli.conversation import Conversation, converse, print_answer
from janus_modular.cli.draw import model_options
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
    collect_settings,
    finite,
)
from janus_modular.cli.replies import write_reply
from janus_modular.cli.terminal_images import image_encoder


def chat(
    model: ModelArgument,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="Default: a conversation in the terminal.")
    ] = None,
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
    sampler: Sampler = None,
    extra_settings: Settings = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this string; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; default: the model's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    draws: Annotated[
        bool,
        typer.Option("--draws", help="Let the model draw where it begins an image, into drawing-N.png."),
    ] = False,
    max_images: Annotated[
        int | None, typer.Option(min=0, help="With --draws: most images of a reply; default 4.")
    ] = None,
    draw_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--draw-set", metavar="NAME=VALUE", help="With --draws: a setting of drawings; may be repeated."
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show drawn images in the terminal: of /draw, and of --draws.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runtime: Runtime = None,
    variant: Variant = None,
    allow_failed: AllowFailed = False,
) -> None:
    """Ask a model questions, with or without images.

    Example: janus-modular chat runs/demo/model "Which digit?" --image seven.png
    """
    from janus_modular.interleaved import image_ends
    from janus_modular.janus import Janus
    from janus_modular.processing.image_io import open_image
    from janus_modular.sequence import ImageInput, Message, Text

    if as_json and question is None:
        raise typer.BadParameter("--json needs a question")
    if show and as_json:
        raise typer.BadParameter("found --show and --json, which both write to stdout; leave one out")
    if show and question is not None and not draws:
        raise typer.BadParameter(
            "found --show and a question; --show is for conversations, where /draw draws: leave one out, or"
            " add --draws"
        )
    if not draws and (max_images is not None or draw_settings):
        raise typer.BadParameter("found --max-images or --draw-set without --draws; add --draws")
    encode = image_encoder(sys.stdout, os.environ) if show else None
    images = [ImageInput(open_image(path)) for path in image or []]
    named = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    settings = collect_settings(named, extra_settings)
    drawing = collect_settings({}, draw_settings, option="--draw-set")
    reply_options: dict[str, Any] = {} if max_images is None else {"max_images": max_images}
    janus = Janus.from_pretrained(
        model, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
    ).use_samplers(text=sampler)
    janus.text_settings(settings)
    if draws:
        janus.image_settings(drawing)
        image_ends(janus.processor)  # refuses a model that never begins an image
    if question is None:
        options = model_options(
            janus, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
        )
        conversation = Conversation(
            janus,
            system,
            image or [],
            model=model,
            options=options,
            encode=encode,
            stop=stop or [],
            reply_options=reply_options if draws else None,
            **settings,
        )
        conversation.drawing_settings |= drawing
        converse(conversation)
        return
    start = [] if system is None else [Message("system", [Text(system)])]
    messages = [*start, Message("user", [*images, Text(question)])]
    names = [str(path) for path in image or []]
    if draws:
        replies = janus.converse(
            messages, stream=True, drawing=drawing, stop=stop or [], **reply_options, **settings
        )
        parts = write_reply(replies, quiet=as_json, encode=encode)
        if as_json:
            reply = replies.reply
            record = {
                "parts": parts,
                "finish_reason": reply.finish_reason,
                "usage": asdict(reply.usage),
                "model": model,
                "images": names,
                "settings": asdict(janus.text_settings(settings)),
                "draw_settings": asdict(janus.image_settings(drawing)),
            }
            typer.echo(json.dumps(record))
        return
    if as_json:
        answer = janus.chat(messages, stop=stop or [], **settings)
        record = {
            "answer": answer,
            "finish_reason": answer.finish_reason,
            "usage": asdict(answer.usage),
            "model": model,
            "images": names,
            "settings": answer.settings,
        }
        typer.echo(json.dumps(record))
        return
    print_answer(janus, messages, stop=stop or [], **settings)
