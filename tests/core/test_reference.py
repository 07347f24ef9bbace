"""The whole model against what the published implementation computes (tests/fixtures/reference)."""

import json
import shutil
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from janus_modular import IGNORE_INDEX, ImageInput, Message, Text, unconditional
from janus_modular import Sequence as TokenSequence
from janus_modular.checkpoints import ModelAssembly
from janus_modular.janus import Janus

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete published checkpoint: the fixture's files, and its weights written out."""
    folder = tmp_path_factory.mktemp("published")
    for file in REFERENCE.glob("*.json"):
        shutil.copy(file, folder)
    spec = spec_from_file_location("deterministic_weights", REFERENCE / "deterministic_weights.py")
    assert spec is not None
    assert spec.loader is not None
    weights = module_from_spec(spec)
    spec.loader.exec_module(weights)
    shapes = json.loads((REFERENCE / "keys.json").read_text())
    save_file(
        {key: weights.tensor_for(key, tuple(shape)) for key, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def janus(checkpoint: Path) -> Janus:
    return Janus.of(ModelAssembly.from_checkpoint(checkpoint))


@pytest.fixture
def astronaut() -> Image.Image:
    return Image.open(REFERENCE / "astronaut.png")


def close(actual: np.ndarray | torch.Tensor, wanted: np.ndarray) -> None:
    """Assert that arrays agree within 1e-4 of their scale (float32, sums in another order)."""
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.fixture
def question(astronaut: Image.Image) -> list[Message]:
    return [Message("user", [ImageInput(astronaut), Text("\nWhat is in the image?")])]


@torch.no_grad()
def test_reads_an_image(janus: Janus, question: list[Message], expected: dict[str, np.ndarray]) -> None:
    pixels = torch.from_numpy(janus.processor.chat_prompt(question).understanding_pixels[0])[None]
    embeddings = janus.model.understanding(pixels)[0]  # (576, D)
    close(embeddings[::16], expected["und_embeds_sub"])
    close(embeddings.mean(0), expected["und_embeds_mean"])


def prompt_of(janus: Janus, ids: np.ndarray, question: Sequence[Message] = ()) -> TokenSequence:
    """Make a prompt of the fixture's ids (they spell no text), the question's images at their places."""
    ids = ids.flatten().astype(np.int64)
    images = janus.processor.chat_prompt(question).understanding_pixels if question else []
    at = ids == janus.processor.tokenizer.id_of("<image_placeholder>")
    return TokenSequence(ids, np.full_like(ids, IGNORE_INDEX), at, np.zeros_like(at), images)


@torch.no_grad()
def test_an_answer(janus: Janus, question: list[Message], expected: dict[str, np.ndarray]) -> None:
    prompt = prompt_of(janus, expected["und_input_ids"], question)
    wanted = expected["und_greedy"].flatten().tolist()
    session = janus.runtime.open(max_seq_len=len(prompt) + len(wanted))
    hidden = session.prefill([prompt])
    close(janus.model.backbone.logits(hidden)[0], expected["und_last_logits"].flatten())
    answer = janus.plugins.entry("text_samplers", "text")
    steps = answer.factory(session, [prompt], answer.config(max_tokens=len(wanted)))
    assert [int(ids[0]) for ids in steps] == wanted


@torch.no_grad()
def test_a_drawing(janus: Janus, expected: dict[str, np.ndarray]) -> None:
    prompt = prompt_of(janus, expected["gen_prompt_ids"])
    wanted = expected["gen_greedy_cfg5"].flatten().tolist()
    session = janus.runtime.open(max_seq_len=len(prompt) + len(wanted))
    hidden = session.prefill([prompt, unconditional(prompt, janus.processor.pad_id)])
    conditional, free = janus.model.generation.head(hidden, hidden[:, :0])
    close(conditional, expected["gen_first_logits_cond"].flatten())
    close(free, expected["gen_first_logits_uncond"].flatten())

    session.image_positions = len(wanted)  # the fixture holds the first 64 of 576
    session.functions = {**session.functions, "decode_image": lambda codes: codes}
    sampler = janus.plugins.entry("image_samplers", "autoregressive")
    steps = sampler.factory(session, [prompt], sampler.config(guidance=5, temperature=0))
    for _ in wanted:
        next(steps)
    with pytest.raises(StopIteration) as drawn:
        next(steps)
    assert drawn.value.value.encoded[0].tolist() == wanted


@torch.no_grad()
def test_pixels_of_codes(janus: Janus, expected: dict[str, np.ndarray]) -> None:
    codes = torch.from_numpy(expected["vq_ids"]).reshape(1, -1).long()
    pixels = janus.model.generation.tokenizer.decode(codes, height=384, width=384)[0]
    close(pixels[:, ::8, ::8], expected["vq_decoded_sub"])


@torch.no_grad()
def test_codes_of_pixels(janus: Janus, question: list[Message], expected: dict[str, np.ndarray]) -> None:
    """At least 99.5 % are equal; the rest are ties within rounding."""
    pixels = torch.from_numpy(janus.processor.chat_prompt(question).understanding_pixels[0])[None]
    codes = janus.model.generation.targets(pixels).flatten().numpy()
    assert (codes == expected["vq_encoded_ids"].flatten()).mean() >= 0.995


def conversation(messages: Sequence[dict[str, str]], image: Image.Image) -> list[Message]:
    """Read a conversation of the fixture: placeholders become images."""
    roles = {"User": "user", "<|User|>": "user", "Assistant": "assistant", "<|Assistant|>": "assistant"}
    out = []
    for message in messages:
        first, *rest = message["content"].split("<image_placeholder>")
        content = [Text(first)] if first else []
        for text in rest:
            content += [ImageInput(image), *([Text(text)] if text else [])]
        out.append(Message(roles[message["role"]], content))
    return out


def test_the_images_it_would_see(janus: Janus, astronaut: Image.Image) -> None:
    """Two images in one question: each between its own marks, 576 places each."""
    prompts = json.loads((REFERENCE / "prompts.json").read_text())
    [two] = [p for p in prompts if p["name"] == "janus understanding, two pictures"]
    prompt = janus.processor.chat_prompt(conversation(two["conversation"], astronaut))
    assert prompt.understanding_mask.sum() == 2 * 576
    assert len(prompt.understanding_pixels) == 2
