"""Images given as codes, drawings that return theirs, and the log-probabilities of codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_modular import (
    ConfigError,
    EncodedSpec,
    ImageTarget,
    Message,
    PromptError,
    Sample,
    Text,
    image_log_probabilities,
    unconditional,
)
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.training.sample_preview import spans

SEVERAL = {
    "name": "open-magvit2",
    "channels": 8,
    "channel_multipliers": [1, 1, 2, 2],
    "residual_blocks": 1,
    "bits": [3, 4],
}


def build(tokenizer: Any = None, head: Any = "mlp") -> Janus:
    torch.manual_seed(0)
    vq = {"name": "vq", "channels": [8, 8, 16, 16], "num_codes": 64, "code_dim": 8}
    janus = Janus.from_components(
        encoder={"name": "vit", "feature_dim": 32, "layers": 1, "heads": 2, "stem": [8, 16, 32],
                 "pixels": {"height": 32, "width": 32}},
        tokenizer=tokenizer or vq,
        head=head,
        size=32,
        backbone={"name": "hf", "config": {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
            "max_position_embeddings": 512}},
        processor={"tokenizer": "bytes", "template": "janus"},
    )  # fmt: skip
    with torch.no_grad():
        for weight in janus.model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)  # so that probabilities differ
    return janus


@pytest.fixture(scope="module", params=["one code", "two codes"])
def janus(request: pytest.FixtureRequest) -> Janus:
    if request.param == "one code":
        return build()
    return build(SEVERAL, {"name": "factorized", "layers": 2, "heads": 2, "hidden": 32})


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def codes(janus: Janus, seed: int) -> np.ndarray:
    """Return the codes of an image, by the tokenizer itself."""
    pixels = torch.from_numpy(np.asarray(image(seed)).transpose(2, 0, 1).copy())[None]
    return janus.model.generation.targets(pixels, [np.random.default_rng(0)])[0].numpy()


def sample(*targets: ImageTarget) -> Sample:
    return Sample([Message("user", [Text("Draw.")]), Message("assistant", list(targets))], source="a")


@pytest.mark.parametrize("encoded", [(0, 1, 2, 3), (1, 2), (0, 3), ()], ids=str)
def test_codes_train_as_their_pixels_do(janus: Janus, encoded: tuple[int, ...]):
    def batch(encoded: tuple[int, ...]) -> Any:
        targets = [
            ImageTarget(encoded=codes(janus, i)) if i in encoded else ImageTarget(image(i)) for i in range(4)
        ]
        samples = [sample(*targets[:2]), sample(targets[2]), sample(targets[3])]
        return collate([janus.processor.sequence(each) for each in samples])

    with torch.no_grad():
        given, pixels = janus.model(batch(encoded)), janus.model(batch(()))
    assert torch.equal(given.hidden, pixels.hidden)
    assert torch.equal(given.losses["image"], pixels.losses["image"])
    assert torch.equal(given.sources["image"], pixels.sources["image"])


def test_a_drawing_returns_the_codes_that_it_was_decoded_from(janus: Janus):
    drawings = janus.draw(["a", "another prompt"], 2, batch_size=3, seed=4)
    assert drawings.encoded is not None
    stacked = torch.from_numpy(np.stack(drawings.encoded))
    assert tuple(stacked.shape[1:]) == janus.model.generation.encoded.shape
    with torch.no_grad():
        decoded = janus.model.generation.decode_image(stacked).numpy()
    for drawn, pixels in zip(drawings, decoded, strict=True):
        difference = np.asarray(drawn, int) - pixels.transpose(1, 2, 0)
        assert np.abs(difference).max() <= 4  # of 255: sums in another order, in another batch
    assert len(np.unique(stacked)) > 4


def test_log_probabilities_are_the_frequencies_of_sampling(janus: Janus):
    """20,000 samples of one position: the share of each code lies within 5 standard deviations."""
    path, prompt = janus.model.generation, janus.processor.draw_prompt("a")
    count, guidance, temperature = 20_000, 3.0, 1.3
    session = janus.runtime.open(len(prompt), 2)
    hidden = session.prefill([prompt, unconditional(prompt, janus.processor.pad_id)])
    rows = hidden.repeat_interleave(count, 0)
    noise = torch.from_numpy(
        np.random.default_rng(0).standard_exponential((count, sum(path.codebooks)), np.float32)
    )
    with torch.no_grad():
        ids, _ = path.sample_image(rows, noise, torch.tensor(guidance), torch.tensor(temperature))
        sampled, counts = torch.unique(ids, dim=0, return_counts=True)
        targets = sampled[:, None]  # (n, 1) or (n, 1, S)
        log_p = path.log_probabilities(
            hidden[:, None].repeat_interleave(len(sampled), 0),
            targets,
            guidance=guidance,
            temperature=temperature,
        )
    p = log_p[:, 0].exp()
    assert float(p.sum()) == pytest.approx(1, abs=0.01)  # codes that were never sampled are rare
    assert len(sampled) > 5
    deviation = (p * (1 - p) / count).sqrt()
    assert bool(((counts / count - p).abs() <= 5 * deviation + 1 / count).all())


def test_codes_are_embedded_as_in_sampling_and_in_training(janus: Janus):
    path, number = janus.model.generation, torch.Generator().manual_seed(0)
    hidden = torch.randn(6, path.hidden_size, generator=number)
    noise = torch.ones(3, path.sizes["codes"]).exponential_(generator=number)
    with torch.no_grad():
        chosen, x = path.sample_image(hidden, noise, torch.tensor(2.0), torch.tensor(1.0))
        embedded = path.embed_codes(chosen.unsqueeze(1))
        stacked = torch.from_numpy(np.stack([codes(janus, i) for i in range(2)]))
        whole, trained = path.embed_codes(stacked), path.embed(stacked)
        torch.testing.assert_close(path.embed_codes(stacked[:, 3:8]), whole[:, 3:8])
    torch.testing.assert_close(embedded[:, 0].repeat(2, 1), x)
    torch.testing.assert_close(whole, trained)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_log_probabilities_follow_the_drawing_step_by_step(janus: Janus, guidance: float):
    drawings = janus.draw("a prompt", 2, guidance=guidance, temperature=0.9, seed=3)
    assert drawings.encoded is not None
    got = janus.log_probabilities("a prompt", drawings.encoded, guidance=guidance, temperature=0.9)
    prompt = janus.processor.draw_prompt("a prompt")
    rows = [prompt, prompt]
    if guidance != 1:
        rows += [unconditional(prompt, janus.processor.pad_id)] * 2
    path = janus.model.generation
    session = janus.runtime.open(len(prompt) + path.num_tokens)
    hidden, drawn = session.prefill(rows), torch.from_numpy(np.stack(drawings.encoded))
    for position in range(path.num_tokens):
        step = path.log_probabilities(
            hidden[:, None], drawn[:, position : position + 1], guidance=guidance, temperature=0.9
        )
        assert step[:, 0].tolist() == pytest.approx(got[:, position].tolist(), abs=1e-3)
        x = path.embed(drawn)[:, position]
        hidden = session.step(x.repeat(len(rows) // 2, 1).detach())
    other = janus.log_probabilities("a prompt", drawings.encoded, guidance=guidance + 2, temperature=0.9)
    assert np.abs(other - got).max() > 0.1


def test_log_probabilities_have_gradients(janus: Janus):
    prompt = janus.processor.draw_prompt("a")
    scores = image_log_probabilities(
        janus.model, [prompt] * 2, [codes(janus, 0), codes(janus, 1)], pad_id=0, guidance=2.0
    )
    assert tuple(scores.shape) == (2, janus.model.generation.num_tokens)
    scores.sum().backward()
    trained = {name.split(".")[0] for name, p in janus.model.named_parameters() if p.grad is not None}
    assert trained == {"backbone", "generation"}
    janus.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], "expected \\(16"),
        (lambda x: x.astype(np.float32), "float32; expected"),
        (lambda x: x + 10_000, "Codes of another image tokenizer do not fit"),
        (lambda x: x - 10_000, "Codes of another image tokenizer do not fit"),
    ],
)
def test_codes_of_another_form_are_refused(janus: Janus, change: Any, message: str):
    wrong = change(codes(janus, 0))
    with pytest.raises(PromptError, match=message):
        janus.processor.sequence(sample(ImageTarget(encoded=wrong)))
    with pytest.raises(PromptError, match=message):
        janus.log_probabilities("a", [wrong])


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": float("nan")}, {"guidance": float("inf")}]
)
def test_settings_without_a_probability_are_refused(janus: Janus, settings: dict[str, float]):
    with pytest.raises(PromptError, match="expected a temperature above 0"):
        janus.log_probabilities("a", [codes(janus, 0)], **settings)


def test_an_image_is_given_once():
    with pytest.raises(PromptError, match="found neither"):
        ImageTarget()
    with pytest.raises(PromptError, match="found both"):
        ImageTarget(image(0), encoded=np.zeros(16, np.int64))


def test_floats_are_checked_too():
    spec = EncodedSpec((2, 3))
    assert spec.checked(np.zeros((2, 3))).dtype == np.float32
    with pytest.raises(ValueError, match="NaN or infinite"):
        spec.checked(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match=r"expected \(2, 3\) of float32"):
        spec.checked(np.zeros((2, 3), np.int64))


def test_a_path_without_codes_refuses_them(janus: Janus, monkeypatch: pytest.MonkeyPatch):
    sequence = janus.processor.sequence(sample(ImageTarget(encoded=codes(janus, 0))))
    monkeypatch.delattr(janus.model.generation, "encoded")
    with pytest.raises(PromptError, match="declares no `encoded`"):
        janus.model(collate([sequence]))
    with pytest.raises(ConfigError, match="gives no log-probabilities"):
        janus.log_probabilities("a", [codes(janus, 0)])
    monkeypatch.setattr(janus.processor, "encoded", None)
    with pytest.raises(PromptError, match="expected the image itself"):
        janus.processor.sequence(sample(ImageTarget(encoded=codes(janus, 0))))


def test_a_preview_names_an_encoded_image(janus: Janus):
    sequence = janus.processor.sequence(sample(ImageTarget(encoded=codes(janus, 0))))
    [span] = [span for span in spans(sequence, janus.processor) if span.modality == "image_target"]
    assert span.pixels is None
    assert span.text.startswith("[encoded image, int64 (16")


def test_a_processor_without_its_model_refuses_codes(janus: Janus, tmp_path: Path):
    janus.processor.save(tmp_path)
    alone = type(janus.processor).load(tmp_path)
    with pytest.raises(PromptError, match="loaded without its model"):
        alone.sequence(sample(ImageTarget(encoded=codes(janus, 0))))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_an_image_continues_from_its_own_prefix(janus: Janus, guidance: float):
    """The noise of the other codes is the same, so that the image is the same."""
    whole = janus.draw("a prompt", 1, guidance=guidance, seed=3)
    assert whole.encoded is not None
    for length in (1, 5, janus.model.generation.num_tokens - 1):
        prefix = whole.encoded[0][:length]
        drawn = janus.draw("a prompt", 1, guidance=guidance, seed=3, prefix=prefix)
        assert drawn.encoded is not None
        assert np.array_equal(drawn.encoded[0], whole.encoded[0])
        assert drawn.settings["prefix"] == tuple(map(tuple, prefix) if prefix.ndim > 1 else prefix)


def test_images_begin_with_a_prefix_of_another_image(janus: Janus):
    prefix = codes(janus, 5)[:7]
    drawings = janus.draw(["a", "b"], 2, prefix=prefix.tolist(), temperature=0)
    assert drawings.encoded is not None
    for encoded in drawings.encoded:
        assert np.array_equal(encoded[:7], prefix)
    free = janus.draw("a", 1, temperature=0)
    assert free.encoded is not None
    assert not np.array_equal(drawings.encoded[0][7:], free.encoded[0][7:])
    again = janus.draw(["a", "b"], 2, **drawings.settings | {"numbers": ()})
    assert again.encoded is not None
    assert np.array_equal(np.stack(again.encoded), np.stack(drawings.encoded))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("12", "prefix: found '12'; expected a list"),
        ([1.5], "prefix: found 1.5; expected a list"),
        ([-1], "prefix: found -1; expected a list"),
        ([[0, 1], [1]], "equally long lists"),
        ([[[0]]], "prefix: found"),
        ([[0, 0, 0]], r"prefix: found an array \(1, 3\) of int64; expected"),
        ("too many", "codes; expected fewer than the 16 of an image"),
        ("too large", "Codes of another image tokenizer do not fit"),
    ],
)
def test_prefixes_of_another_form_are_refused(janus: Janus, prefix: Any, message: str):
    whole = codes(janus, 0)
    chosen = {"too many": whole, "too large": whole[:2] + 10_000}.get(str(prefix), prefix)
    with pytest.raises(PromptError, match=message):
        janus.draw("a", prefix=chosen)
