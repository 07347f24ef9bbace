"""Images in prompts as they are drawn, and drawings that begin with an image: a bundle against torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_modular import ImageInput, ImageTarget, Janus, Message, PromptError, Text
from janus_modular.processing.image_transforms import generation_pixels

IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30 + i, 3), dtype=np.uint8))
    for i in range(2)
]


@pytest.fixture(scope="module")
def torches(tiny_checkpoint: Path) -> Janus:
    return Janus.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def bundled(tiny_bundle: Path) -> Janus:
    return Janus.from_pretrained(tiny_bundle, runtime={"name": "onnx", "threads": 1})


def tokenizer_pixels(image: Image.Image) -> torch.Tensor:
    """Cover 32 x 32 by a plain resize and crop: 40 high and 30 wide become 42 high."""
    side = image.resize((32, int(32 * image.height / image.width)), Image.Resampling.BICUBIC)
    top = (side.height - 32) // 2
    cut = np.asarray(side.crop((0, top, 32, top + 32)))
    return torch.from_numpy(cut.transpose(2, 0, 1).copy())[None]


def test_an_image_is_encoded_by_the_models_own_tokenizer(torches: Janus, bundled: Janus) -> None:
    codes = torches.encode_images(IMAGES)
    tokenizer = torches.model.generation.tokenizer
    for image, ours in zip(IMAGES, codes, strict=True):
        pixels = torch.from_numpy(generation_pixels(image, height=32, width=32))[None].float() / 255 * 2 - 1
        np.testing.assert_array_equal(ours, tokenizer.encode(pixels)[0])
        resized = tokenizer_pixels(image).float() / 255 * 2 - 1  # box and crop round differently
        assert float((resized - pixels).abs().mean()) < 0.1
    np.testing.assert_array_equal(np.stack(bundled.encode_images(IMAGES)), np.stack(codes))


def test_the_upper_half_of_an_image_stays_and_the_rest_is_drawn(torches: Janus, bundled: Janus) -> None:
    [codes] = torches.encode_images(IMAGES[0])
    half = codes[: len(codes) // 2]
    drawn = torches.draw("a bird", 2, prefix=half, seed=3, temperature=4.0)
    for one in drawn.encoded:
        np.testing.assert_array_equal(one[:8], half)
    assert (drawn.encoded[0][8:] != drawn.encoded[1][8:]).any()
    np.testing.assert_array_equal(
        bundled.draw("a bird", 2, prefix=half, seed=3, temperature=4.0).encoded, drawn.encoded
    )


@pytest.mark.parametrize("form", ["input", "encoded", "both"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_in_the_prompt_changes_a_drawing_in_torch_as_in_a_bundle(
    torches: Janus, bundled: Janus, form: Any, guidance: float
) -> None:
    settings = {"guidance": guidance, "seed": 5, "image_form": form}
    drawn = torches.draw("make it blue", images=IMAGES[0], **settings)
    np.testing.assert_array_equal(
        bundled.draw("make it blue", images=IMAGES[0], **settings).encoded, drawn.encoded
    )
    other = torches.draw("make it blue", images=IMAGES[1], **settings)
    assert (np.stack(other.encoded) != np.stack(drawn.encoded)).any()
    batch = torches.draw(["make it blue", "make it red"], images=[IMAGES[0]], **settings)
    np.testing.assert_array_equal(batch.encoded[0], drawn.encoded[0])


@torch.no_grad()
def test_a_drawing_with_an_image_given_in_both_forms_is_the_plain_rule(torches: Janus) -> None:
    """Greedy, against forward passes over the whole sequence, of embeddings put together by hand."""
    model, processor = torches.model, torches.processor
    [codes] = torches.encode_images(IMAGES[0])
    given = [ImageInput(IMAGES[0]), ImageTarget(encoded=codes, supervised=False)]
    prompt = processor.draw_prompt([Message("user", [*given, Text("make it blue")])])
    read = np.flatnonzero(prompt.understanding_mask)
    as_drawn = np.flatnonzero(prompt.generation_mask)
    assert read.max() < as_drawn.min()
    x = model.backbone.embed(torch.from_numpy(prompt.tokens)[None])
    pixels = torch.from_numpy(prompt.understanding_pixels[0])[None]
    x[0, read] = model.understanding(pixels)[0]
    x[0, as_drawn] = model.generation.embed(torch.from_numpy(codes)[None])[0]
    drawn = []
    for _ in codes:
        hidden = model.backbone(x, positions=torch.arange(x.shape[1])[None])[0, -1]
        code = model.generation.head(hidden[None], torch.empty(1, 0, dtype=torch.int64)).argmax(-1)
        drawn.append(int(code))
        x = torch.cat([x, model.generation.embed_codes(code[None])], dim=1)
    ours = torches.draw("make it blue", images=IMAGES[0], image_form="both", guidance=1.0, temperature=0.0)
    assert ours.encoded[0].tolist() == drawn


def test_a_conversation_with_drawn_images_is_a_prompt_in_torch_and_in_a_bundle(
    torches: Janus, bundled: Janus
) -> None:
    [codes] = torches.draw("a bird", seed=1).encoded
    conversation = [
        Message("user", [Text("a bird")]),
        Message("assistant", [Text("Here:"), ImageTarget(encoded=codes)]),
        Message("user", [ImageInput(IMAGES[0]), Text("and now like this")]),
    ]
    answers = [janus.chat(conversation, max_tokens=6) for janus in (torches, bundled)]
    assert answers[0] == answers[1]
    as_pixels = [*conversation[:1], Message("assistant", [Text("Here:"), ImageTarget(IMAGES[1])])]
    np.testing.assert_array_equal(
        bundled.draw([*as_pixels, conversation[2]], seed=2).encoded,
        torches.draw([*as_pixels, conversation[2]], seed=2).encoded,
    )


def test_codes_of_another_tokenizer_are_refused_by_a_bundle(bundled: Janus) -> None:
    wrong = Message("user", [ImageTarget(encoded=np.full(16, 64))])
    with pytest.raises(PromptError, match=r"below 64\. Codes of another image tokenizer do not fit"):
        bundled.draw([wrong])


def test_a_path_that_embeds_images_with_noise_alone_refuses_given_ones(
    flow_checkpoint: Path, flow_bundle: Path
) -> None:
    for folder in (flow_checkpoint, flow_bundle):
        janus = Janus.from_pretrained(folder)
        with pytest.raises(PromptError, match="no graph of the role 'embed'"):
            janus.draw("make it blue", images=IMAGES[0], image_form="encoded")
        assert len(janus.draw("make it blue", images=IMAGES[0])) == 1


def test_a_bundle_of_an_earlier_version_refuses_codes_and_takes_other_prompts(
    tiny_bundle: Path, codes_of: Callable[..., Any]
) -> None:
    janus = Janus.from_pretrained(tiny_bundle, variant="fp32")
    del janus.runtime.bundle.manifest["graphs"]["embed_codes"]
    with pytest.raises(PromptError, match="of an earlier version, may be exported again"):
        janus.draw("make it blue", images=IMAGES[0], image_form="encoded")
    assert len(codes_of(janus, seed=7)[0])
