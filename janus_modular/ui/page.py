"""The page: a chat with images, a gallery of drawings, and what the server runs."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from janus_modular.errors import JanusError
from janus_modular.foreign import printable
from janus_modular.ui.api_client import ApiClient
from janus_modular.ui.chat_messages import messages_of

PARTIAL_IMAGES = 3

FONTS = ["system-ui", "sans-serif"]
"""Fonts of the reader's machine: the default theme loads others from the Internet."""

CLEANING = (3_600, 86_400)
"""Seconds between two deletions of old copies of images, and their age."""


def make_page(client: ApiClient) -> gr.Blocks:
    """Return the page of a server, which must be there.

    Raises:
        ServingError: the server does not answer.
    """
    model = client.model()
    title = f"janus-modular: {model['id']}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.Markdown(_description(model))
        with gr.Tab("Chat"):
            _chat(client)
        if model.get("image_size"):
            with gr.Tab("Draw"):
                _draw(client)
    return page


def launch(page: gr.Blocks, port: int) -> None:
    """Show a page to this machine at a port, 0: any from 7860 on that is free; return after Ctrl-C."""
    page.queue().launch(
        server_name="127.0.0.1",
        server_port=port or None,
        theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]),
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        inbrowser=False,
    )


def _description(model: Mapping[str, Any]) -> str:
    variant = f", variant `{model['variant']}`" if model.get("variant") else ""
    image = f"draws {model['image_size']}" if model.get("image_size") else "does not draw"
    return (
        f"## {model['id']}\n"
        f"{model.get('runtime', '')}{variant}; {image}; context {model.get('context', '?')}; samplers"
        f" `{model.get('text_sampler', '?')}`, `{model.get('image_sampler', '?')}`"
    )


def _chat(client: ApiClient) -> None:
    def answer(
        question: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        max_tokens: float,
        temperature: float,
        seed: str | None,
    ) -> Iterator[str]:
        fields = {"max_tokens": int(max_tokens), "temperature": temperature, "seed": _seed(seed)}
        try:
            yield from client.chat(messages_of(history, question), **fields)
        except JanusError as error:
            raise gr.Error(str(error)) from error

    gr.ChatInterface(
        answer,
        chatbot=gr.Chatbot(label="Chat", buttons=["copy", "copy_all"], render=False),
        multimodal=True,
        textbox=gr.MultimodalTextbox(
            file_types=["image"], file_count="multiple", placeholder="Ask", render=False
        ),
        additional_inputs=[  # not rendered here, but below the chat
            gr.Slider(1, 2048, value=256, step=1, label="Longest answer, in tokens", render=False),
            gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: the most likely token)", render=False),
            gr.Textbox(label="Seed", placeholder="random", render=False),
        ],
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        api_name="chat",
        flagging_mode="never",
        analytics_enabled=False,
    )


def _draw(client: ApiClient) -> None:
    def draw(
        prompt: str, n: float, guidance: float, temperature: float, seed: str | None
    ) -> Iterator[tuple[list[tuple[str, str]], dict[str, Any]]]:
        fields = {"n": int(n), "guidance": guidance, "temperature": temperature, "seed": _seed(seed)}
        images: dict[int, tuple[str, str]] = {}
        applied: dict[str, Any] = {}
        try:
            with TemporaryDirectory(prefix="janus-page-") as folder:  # Gradio copies what it shows
                for count, event in enumerate(client.draw(prompt, partial_images=PARTIAL_IMAGES, **fields)):
                    number = event.get("partial_image_index")
                    done = "" if number is None else f"{(number + 1) * 100 // (PARTIAL_IMAGES + 1)} %"
                    # A file, written once: Gradio would write an image anew with each event that shows it,
                    # while browsers read it.
                    file = Path(folder, f"{count}.png")
                    file.write_bytes(base64.b64decode(event["b64_json"]))
                    images[event["image_index"]] = str(file), done
                    applied = event.get("settings", applied)
                    yield [images[index] for index in sorted(images)], applied
        except JanusError as error:
            raise gr.Error(str(error)) from error

    with gr.Row():
        with gr.Column(scale=1):
            prompt = gr.Textbox(label="What to draw", lines=3)
            n = gr.Slider(1, 8, value=4, step=1, label="Images")
            guidance = gr.Slider(1, 12, value=5, step=0.5, label="Guidance (1: none)")
            temperature = gr.Slider(0, 2, value=1, step=0.05, label="Temperature")
            seed = gr.Textbox(label="Seed", placeholder="random")
            with gr.Row():
                start, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop")
        with gr.Column(scale=2):
            buttons = ["download", "download_all", "fullscreen"]
            gallery = gr.Gallery(label="Images", columns=4, object_fit="contain", buttons=buttons)
            settings = gr.JSON(label="Applied settings")
    running = start.click(
        draw, [prompt, n, guidance, temperature, seed], [gallery, settings], api_name="draw"
    )
    stop.click(None, cancels=[running], api_name=False)


def _seed(text: str | None) -> int | None:
    """Return the seed in a field of text, None if it is empty; until the field is shown, its text is None.

    Gradio's field of a number has 0 where it is empty.
    """
    try:
        return int(text) if text and text.strip() else None
    except ValueError:
        raise gr.Error(f"Seed: found '{printable(text)}'; expected a whole number, or nothing.") from None
