from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from janus_modular import IGNORE_INDEX, ImageInput, ImageTarget, Message, PromptError, Sample, Sequence, Text
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model import model as model_module
from janus_modular.model.batch import collate, pack
from janus_modular.model.model import JanusModel, merge_features
from janus_modular.processing.processor import Processor


@pytest.fixture(scope="module")
def built() -> tuple[JanusModel, Processor]:
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(load("tiny"), ModelConfig))
    model, processor = assembly.model, assembly.processor
    return model.eval(), processor


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


@pytest.fixture
def sequences(built: tuple[JanusModel, Processor]) -> list[Sequence]:
    """Words alone; an image read; one drawn; two read, words between, two drawn, one of them learned."""
    read, draw = (
        (lambda i: ImageInput(image(i))),
        (lambda i, learn=True: ImageTarget(image(i), learn)),
    )
    conversations = [
        [[Text("Hello.")], [Text("Good day to you.", True)]],
        [[read(1), Text("What is it?")], [Text("Noise.", True)]],
        [[Text("Draw noise.")], [draw(2)]],
        [
            [read(3), Text("and"), read(4), Text("?")],
            [Text("So:", True), draw(5), draw(6, False), Text("Ha!", True)],
        ],
    ]
    roles = ("user", "assistant")
    return [
        built[1].sequence(Sample([Message(r, c) for r, c in zip(roles, turns, strict=True)], source=f"s{i}"))
        for i, turns in enumerate(conversations)
    ]


def by_source(model: JanusModel, batches: list) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for batch in batches:
        with torch.no_grad():
            output = model(batch)
        for name, loss in output.losses.items():
            for at, value in zip(output.sources[name].tolist(), loss.tolist(), strict=True):
                found.setdefault((name, batch.sources[at]), []).append(value)
    return found


def test_packed_equals_padded_equals_alone(
    built: tuple[JanusModel, Processor], sequences: list[Sequence]
) -> None:
    """Every loss of every sequence, however they lie side by side. 1e-6 of losses near 5, in float32."""
    model, _ = built
    alone = by_source(model, [collate([one]) for one in sequences])
    rows = pack(sequences, 512)
    assert max(map(len, rows)) > 1
    packed, padded = by_source(model, [collate(rows)]), by_source(model, [collate(sequences)])
    assert alone.keys() == packed.keys() == padded.keys()
    for key, values in alone.items():
        assert packed[key] == pytest.approx(values, rel=1e-6, abs=1e-6)
        assert padded[key] == pytest.approx(values, rel=1e-6, abs=1e-6)


def test_losses_are_cross_entropy_of_what_comes_next(
    built: tuple[JanusModel, Processor], sequences: list[Sequence]
) -> None:
    """Against every logit of the sequence, taken one position at a time."""
    model, _ = built
    sequence = sequences[3]
    batch = collate([sequence])
    with torch.no_grad():
        output = model(batch)
        hidden = output.hidden[0]
        words = [
            F.cross_entropy(model.backbone.logits(hidden[t]), torch.tensor(label))
            for t, label in enumerate(sequence.labels.tolist())
            if label != IGNORE_INDEX
        ]
        codes = model.generation.targets(batch.generation_pixels)[0]  # of the image that is learned
        first = int(sequence.generation_mask.argmax())
        drawn = [
            F.cross_entropy(model.generation.head(hidden[first - 1 + i], hidden[0, :0]), code)
            for i, code in enumerate(codes)
        ]
    torch.testing.assert_close(output.losses["text"], torch.stack(words))
    torch.testing.assert_close(output.losses["image"], torch.stack(drawn))


def test_text_losses_in_chunks_are_those_of_all_logits_at_once(
    built: tuple[JanusModel, Processor], sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients; sums of single rows may be in another order (float32)."""
    model, _ = built
    batch = collate(sequences)
    results = []
    for limit in (model_module.MAX_LOGITS, 7 * model.backbone.vocab_size + 1, 1):
        monkeypatch.setattr(model_module, "MAX_LOGITS", limit)
        model.zero_grad()
        losses = model(batch).losses["text"]
        losses.mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((losses.detach(), grads))
    assert len(results[0][0]) > 20
    for losses, grads in results[1:]:
        torch.testing.assert_close(losses, results[0][0])
        torch.testing.assert_close(grads, results[0][1])
    model.zero_grad(set_to_none=True)


def test_a_loss_per_image_counts_as_the_loss_of_its_positions(
    built: tuple[JanusModel, Processor], sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = built
    path, batch = model.generation, collate(sequences)
    losses = path.losses
    with torch.no_grad():
        per_position = model(batch)

        def per_image_losses(hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: loss.mean(1) for name, loss in losses(hidden, targets).items()}

        monkeypatch.setattr(path, "losses", per_image_losses)
        per_image = model(batch)
    expected = per_position.losses["image"].view(-1, path.num_tokens).mean(1)
    torch.testing.assert_close(per_image.losses["image"], expected.repeat_interleave(path.num_tokens))
    assert torch.equal(per_image.sources["image"], per_position.sources["image"])


def test_an_image_reaches_what_follows_and_nothing_before(
    built: tuple[JanusModel, Processor], sequences: list[Sequence]
) -> None:
    model, _ = built
    one, other = collate([sequences[1]]), collate([sequences[1]])
    assert other.understanding_pixels is not None
    other.understanding_pixels = 255 - other.understanding_pixels
    first = int(sequences[1].understanding_mask.argmax())
    with torch.no_grad():
        a, b = model(one).hidden[0], model(other).hidden[0]
    torch.testing.assert_close(a[:first], b[:first], rtol=0, atol=0)
    assert ((a - b).abs().amax(-1)[first:] > 1e-4).all()


def test_words_alone_run_no_visual_path(
    built: tuple[JanusModel, Processor], sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = built

    def refuse(*args: object) -> None:
        raise AssertionError("a visual path ran")

    monkeypatch.setattr(model.understanding, "forward", refuse)
    monkeypatch.setattr(model.generation, "targets", refuse)
    monkeypatch.setattr(model.generation.adaptor, "forward", refuse)
    assert set(model(collate(sequences[:1])).losses) == {"text"}


def test_every_part_gets_a_gradient(built: tuple[JanusModel, Processor], sequences: list[Sequence]) -> None:
    model, _ = built
    output = model(collate(pack(sequences, 512)))
    sum(loss.sum() for loss in output.losses.values()).backward()  # type: ignore[union-attr]
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    model.zero_grad()
    assert {name.split(".tokenizer.")[0] for name in without} == {"generation"}  # codes are targets


def test_place_puts_features_in_order_and_leaves_its_arguments() -> None:
    x = torch.zeros(2, 4, 3)
    features = torch.arange(1.0, 13.0).view(2, 2, 3)
    at = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    placed = merge_features(features, x, mask=at)
    assert torch.equal(placed[at], features.view(4, 3))
    assert not placed[~at].any()
    assert not x.any()


@pytest.mark.parametrize(("kind", "how"), [("understanding_mask", "read"), ("generation_mask", "drawn")])
def test_counts_that_differ_are_an_error(
    built: tuple[JanusModel, Processor], sequences: list[Sequence], kind: str, how: str
) -> None:
    batch = collate(sequences)
    at = getattr(batch, kind)
    at[tuple(at.nonzero()[0])] = False
    message = f"47 positions for images that are {how}, but its 3 images have 48 features"
    with pytest.raises(PromptError, match=message):
        built[0](batch)
