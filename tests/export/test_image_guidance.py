"""Guidance with three rows, as Janus-4o draws, and replies with images: a bundle against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_modular import ImageInput, ImageTarget, Janus, Message, PromptError, Text
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
WHOLE: dict[str, Any] = {"images": PHOTO, "image_form": "both"}


def random_assembly(*overrides: str) -> ModelAssembly:
    """configs/model/tiny with random weights of std 0.3, whose answers often begin images."""
    torch.manual_seed(0)
    untied = "backbone.config.tie_word_embeddings=false"
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", [untied, *overrides]), ModelConfig))
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    begin = assembly.processor.tokenizer.special_id("begin_image")
    with torch.no_grad():
        assembly.model.backbone.model.lm_head.weight[begin] *= 4
    return assembly


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that draws with three rows."""
    folder = tmp_path_factory.mktemp("edits") / "model"
    save(random_assembly("generation.image_guidance=true"), folder)
    return folder


@pytest.fixture(scope="module")
def torches(checkpoint: Path) -> Janus:
    return Janus.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def bundled(checkpoint: Path) -> Janus:
    export(checkpoint, checkpoint.parent / "bundle", ExportConfig(variants=["fp32"]))
    return Janus.from_pretrained(checkpoint.parent / "bundle", runtime={"name": "onnx", "threads": 1})


@torch.no_grad()
def plain_codes(janus: Janus, guidance: float, weight: float) -> list[int]:
    """Greedy, by forward passes over three whole sequences, with the logits mixed as Janus-4o mixes them."""
    model, processor = janus.model, janus.processor
    [codes] = janus.encode_images(PHOTO)
    given = [ImageInput(PHOTO), ImageTarget(encoded=codes, supervised=False), Text("make it blue")]
    prompt = processor.draw_prompt([Message("user", given)])
    full = torch.from_numpy(prompt.tokens)
    partial, none = full.clone(), full.clone()
    partial[prompt.generation_mask] = processor.pad_id
    none[1:-1] = processor.pad_id
    x = model.backbone.embed(torch.stack([full, partial, none]))
    features = model.understanding(torch.from_numpy(prompt.understanding_pixels[0])[None])[0]
    x[:2, np.flatnonzero(prompt.understanding_mask)] = features
    x[0, np.flatnonzero(prompt.generation_mask)] = model.generation.embed(torch.from_numpy(codes)[None])[0]
    drawn = []
    for _ in codes:
        hidden = model.backbone(x, positions=torch.arange(x.shape[1]).expand(3, -1))[:, -1]
        full_, part, uncond = model.generation.head(hidden, torch.empty(3, 0, dtype=torch.int64))
        mixed = (full_ + weight * part) / (1 + weight)
        code = (uncond + guidance * (mixed - uncond)).argmax()
        drawn.append(int(code))
        x = torch.cat([x, model.generation.embed_codes(code.view(1, 1)).expand(3, 1, -1)], dim=1)
    return drawn


@pytest.mark.parametrize(("guidance", "weight"), [(5.0, 5.0), (2.0, 0.5), (1.0, 3.0)])
def test_three_rows_are_mixed_as_janus_4o_mixes_them(torches: Janus, guidance: float, weight: float) -> None:
    settings = {"guidance": guidance, "image_guidance": weight, "temperature": 0.0}
    drawn = torches.draw("make it blue", **WHOLE, **settings)
    assert drawn.encoded[0].tolist() == plain_codes(torches, guidance, weight)
    two_rows = torches.draw("make it blue", **WHOLE, guidance=guidance, temperature=0.0)
    assert (drawn.encoded[0] != two_rows.encoded[0]).any()


def test_two_rows_are_those_of_a_model_without_a_third(torches: Janus) -> None:
    other = Janus.of(random_assembly())
    for guidance in (1.0, 4.0):
        settings = {"guidance": guidance, "seed": 5}
        expected = other.draw("make it blue", **WHOLE, **settings)
        drawn = torches.draw("make it blue", **WHOLE, **settings)
        np.testing.assert_array_equal(drawn.encoded, expected.encoded)
    with pytest.raises(PromptError, match=r"draws with two rows.*generation.image_guidance=true"):
        other.draw("make it blue", **WHOLE, image_guidance=5)
    with pytest.raises(PromptError, match="without an image that is given encoded"):
        torches.draw("make it blue", images=PHOTO, image_guidance=5)


@pytest.mark.parametrize(
    "settings", [{"image_guidance": 2.0, "seed": 3}, {"guidance": 1.0, "seed": 3}, {"seed": 4}]
)
def test_a_bundle_draws_with_three_rows_as_torch_does(
    bundled: Janus, torches: Janus, settings: dict[str, Any]
) -> None:
    expected = torches.draw("make it blue", 2, **WHOLE, **settings)
    drawn = bundled.draw("make it blue", 2, **WHOLE, **settings)
    np.testing.assert_array_equal(drawn.encoded, expected.encoded)


def test_a_bundle_replies_with_the_images_and_texts_of_torch(bundled: Janus, torches: Janus) -> None:
    settings: dict[str, Any] = {"max_tokens": 24, "max_images": 2, "drawing": {"guidance": 2.0, "seed": 7}}
    expected, reply = (janus.converse("draw", PHOTO, **settings) for janus in (torches, bundled))
    assert len(expected.encoded) == 2
    np.testing.assert_array_equal(reply.encoded, expected.encoded)
    assert reply.text == expected.text
    assert (reply.finish_reason, reply.usage) == (expected.finish_reason, expected.usage)
    question = Message("user", [ImageInput(PHOTO), Text("draw")])
    conversation = [question, expected.message, Message("user", [Text("again")])]
    replies = [janus.converse(conversation, **settings) for janus in (torches, bundled)]
    assert replies[0].text == replies[1].text
