"""Replies in which the model begins images itself: against plain forward passes, and each of its ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular import ImageInput, Janus, Message, PromptError, Text
from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.training.initial_model import let_answers_begin_images

BEGIN = "<begin_of_image>"
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def drawing_janus(*, begins: bool = True) -> Janus:
    """A tiny model that often begins images: the row of that token points where many states point."""
    torch.manual_seed(0)
    overrides = ["backbone.config.tie_word_embeddings=false", f"processor.suppress_tokens=['{BEGIN}']"]
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", overrides), ModelConfig))
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    if begins:
        let_answers_begin_images(assembly)
    return Janus.of(assembly)


def make_eager(janus: Janus, factor: float = 4.0) -> None:
    """Scale up the logit of begin-of-image, whatever its sign, so that some states choose it."""
    head = janus.model.backbone.model.lm_head.weight
    with torch.no_grad():
        head[janus.processor.tokenizer.special_id("begin_image")] *= factor


@pytest.fixture(scope="module")
def janus() -> Janus:
    made = drawing_janus()
    make_eager(made)
    return made


DRAWING = {"guidance": 1.0, "temperature": 0.0}


@torch.no_grad()
def plain_reply(janus: Janus, question: str, max_tokens: int, max_images: int) -> list[Any]:
    """Greedy, by a forward pass over the whole sequence for each token and each code."""
    model, processor = janus.model, janus.processor
    begin, end = (processor.tokenizer.special_id(name) for name in ("begin_image", "end_image"))
    prompt = processor.chat_prompt([Message("user", [ImageInput(PHOTO), Text(question)])])
    x = model.backbone.embed(torch.from_numpy(prompt.tokens)[None])
    pixels = torch.from_numpy(prompt.understanding_pixels[0])[None]
    x[0, np.flatnonzero(prompt.understanding_mask)] = model.understanding(pixels)[0]

    def last() -> torch.Tensor:
        return model.backbone(x, positions=torch.arange(x.shape[1])[None])[:, -1]

    said: list[Any] = []
    tokens = images = 0
    while tokens < max_tokens:
        logits = model.backbone.logits(last())[0]
        logits[list(processor.suppressed_ids)] = -torch.inf
        id = int(logits.argmax())
        tokens += 1
        said.append(id)
        x = torch.cat([x, model.backbone.embed(torch.tensor([[id]]))], dim=1)
        if id in processor.stop.ids:
            break
        if id != begin:
            continue
        if images == max_images:
            break
        codes = []
        for _ in range(model.generation.num_tokens):
            code = model.generation.head(last(), torch.empty(1, 0, dtype=torch.int64)).argmax(-1)
            codes.append(int(code))
            x = torch.cat([x, model.generation.embed_codes(code[None])], dim=1)
        images += 1
        said.append(codes)
        x = torch.cat([x, model.backbone.embed(torch.tensor([[end]]))], dim=1)
    return said


def test_a_reply_is_what_plain_forward_passes_give(janus: Janus) -> None:
    expected = plain_reply(janus, "draw what you see", 24, 2)
    begin = janus.processor.tokenizer.special_id("begin_image")
    images = [item for item in expected if isinstance(item, list)]
    assert len(images) == 2  # the model began two
    reply = janus.converse("draw what you see", PHOTO, max_images=2, drawing=DRAWING, max_tokens=24)
    assert [codes.tolist() for codes in reply.encoded] == images
    runs: list[list[int]] = [[]]
    for item in expected:
        if isinstance(item, list):
            runs.append([])
        elif item != begin:
            runs[-1].append(item)
    decoded = [janus.processor.tokenizer.decode(np.array(run)).strip() for run in runs]
    texts = [part for part in reply.parts if isinstance(part, str)]
    assert texts == [text for text in decoded if text]
    assert reply.usage.completion_tokens == len([item for item in expected if isinstance(item, int)])
    assert reply.usage.image_tokens == 2 * 16
    assert reply.finish_reason in ("image", "length", "stop")


def test_a_stream_is_the_reply_and_reports_progress(janus: Janus) -> None:
    settings: dict[str, Any] = {"max_images": 1, "drawing": {"seed": 3}, "max_tokens": 12}
    told: list[tuple[int, int]] = []
    whole = janus.converse("draw", **settings, progress=lambda *steps: told.append(steps))
    stream = janus.converse("draw", **settings, stream=True)
    parts = list(stream)
    assert "".join(part for part in parts if isinstance(part, str)).strip() == "".join(
        part for part in whole.parts if isinstance(part, str)
    )
    images = [part for part in parts if isinstance(part, Image.Image)]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in whole.images]
    assert len(images) == 1
    assert told == [(step, 16) for step in range(1, 17)]


def test_a_conversation_goes_on_behind_a_reply(janus: Janus) -> None:
    reply = janus.converse("draw", max_images=1, drawing=DRAWING, max_tokens=12)
    conversation = [
        Message("user", [Text("draw")]), reply.message, Message("user", [Text("again, in blue")]),
    ]  # fmt: skip
    prompt = janus.processor.chat_prompt(conversation)
    assert prompt.generation_mask.sum() == 16
    np.testing.assert_array_equal(prompt.generation_images[0], reply.encoded[0])
    assert janus.converse(conversation, max_tokens=4, max_images=0).usage.prompt_tokens == len(prompt)


def test_images_of_a_reply_have_noise_of_their_own(janus: Janus) -> None:
    drawing = {"guidance": 1.0, "temperature": 5.0, "first": 2}
    reply = janus.converse("draw what you see", PHOTO, max_images=2, drawing=drawing, max_tokens=64)
    assert len(reply.encoded) == 2
    assert (reply.encoded[0] != reply.encoded[1]).any()


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_images": 0}, "image"), ({"max_tokens": 1}, "length"), ({"context": 90}, "context")],
)
def test_why_a_reply_ends(
    janus: Janus, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], reason: str
) -> None:
    expected = plain_reply(janus, "draw what you see", 24, 1)
    begin = janus.processor.tokenizer.special_id("begin_image")
    assert begin in expected
    settings = {"max_tokens": 24, "max_images": 1} | options
    if context := settings.pop("context", None):
        prompt = janus.processor.chat_prompt(
            [Message("user", [ImageInput(PHOTO), Text("draw what you see")])]
        )
        monkeypatch.setattr(janus.runtime, "context", len(prompt) + expected.index(begin) + 4)
        del context
    reply = janus.converse("draw what you see", PHOTO, drawing=DRAWING, **settings)
    assert reply.finish_reason == reason


def test_chat_ends_where_the_model_begins_an_image(janus: Janus) -> None:
    assert plain_reply(janus, "draw what you see", 24, 0)[-1] == janus.processor.tokenizer.special_id(
        "begin_image"
    )
    answer = janus.chat("draw what you see", PHOTO, max_tokens=24)
    assert answer.finish_reason == "image"
    assert not answer.was_cut


def test_models_that_cannot_are_refused_with_the_reason() -> None:
    with pytest.raises(PromptError, match=r"among the tokens that answers never contain.*learn_image_ends"):
        drawing_janus(begins=False).converse("draw")
    flow = ModelAssembly.from_config(resolve(load("model/tiny_flow"), ModelConfig))
    let_answers_begin_images(flow)
    with pytest.raises(PromptError, match="no text can follow a drawing"):
        Janus.of(flow).converse("draw")


@pytest.mark.parametrize("where", ["settings", "drawing"])
def test_numbers_of_rows_are_refused(janus: Janus, where: str) -> None:
    options = {"numbers": [1]} if where == "settings" else {"drawing": {"numbers": [1]}}
    with pytest.raises(PromptError, match="numbers: found numbers of rows"):
        janus.converse("draw", **options)


def test_the_command_writes_texts_and_files(
    janus: Janus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    janus.save_pretrained(tmp_path / "model")
    PHOTO.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    options = ["--draws", "--max-images", "2", "--max-tokens", "24", "--draw-set", "guidance=1"]
    command = ["chat", "model", "draw what you see", "--image", "photo.png", *options]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "[drawing-1.png]" in shown.stdout
    asked = CliRunner().invoke(app, [*command, "--json"])
    record = json.loads(asked.stdout)
    images = [part["image"] for part in record["parts"] if "image" in part]
    assert images == ["drawing-3.png", "drawing-4.png"]  # the first two are there already
    assert Image.open("drawing-3.png").tobytes() == Image.open("drawing-1.png").tobytes()
    assert record["draw_settings"]["guidance"] == 1
    refused = CliRunner().invoke(app, ["chat", "model", "draw", "--max-images", "2"])
    assert refused.exit_code
    assert "add --draws" in refused.output
