"""The command ``chat``: questions about images, once or in a conversation."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

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
    show: Annotated[
        bool, typer.Option("--show", help="Show in the terminal what /draw draws in a conversation.")
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
    from janus_modular.janus import Janus
    from janus_modular.processing.image_io import open_image
    from janus_modular.sequence import ImageInput, Message, Text

    if as_json and question is None:
        raise typer.BadParameter("--json needs a question")
    if show and question is not None:
        raise typer.BadParameter(
            "found --show and a question; --show is for conversations, where /draw draws: leave one out"
        )
    encode = image_encoder(sys.stdout, os.environ) if show else None
    images = [ImageInput(open_image(path)) for path in image or []]
    named = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    settings = collect_settings(named, extra_settings)
    janus = Janus.from_pretrained(
        model, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
    ).use_samplers(text=sampler)
    janus.text_settings(settings)
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
            **settings,
        )
        converse(conversation)
        return
    start = [] if system is None else [Message("system", [Text(system)])]
    messages = [*start, Message("user", [*images, Text(question)])]
    if as_json:
        answer = janus.chat(messages, stop=stop or [], **settings)
        names = [str(path) for path in image or []]
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
