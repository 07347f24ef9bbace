"""Training on a conversation with an image that is read, one given as codes, and one drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from janus_modular import ImageInput, ImageTarget, Janus, Message, Sample, Text, open_image
from janus_modular.model.batch import collate
from janus_modular.plugins import default_plugins
from janus_modular.sequence import IGNORE_INDEX
from janus_modular.training.initial_model import initial_model
from janus_modular.training.train import train

BEGIN, END = "<begin_of_image>", "<end_of_image>"


@pytest.fixture
def talk(data: Path) -> dict[str, dict[str, object]]:
    """The changes of a config that trains on one conversation: "make it red", of a blue image."""
    turns = [
        {"role": "user", "content": [{"read": "blue.png"}, {"draw": "blue.png"}, "Make it red."]},
        {"role": "assistant", "content": ["Here:", {"draw": "red.png"}]},
    ]
    (data / "talk.jsonl").write_text(json.dumps({"messages": turns}))
    sources = {"talk": {"name": "jsonl", "path": str(data / "talk.jsonl")}}
    return {"sources": sources, "mixture": {"talk": 1}}


def test_one_step_trains_the_drawn_image_and_what_begins_it(make, talk, metrics, data: Path) -> None:
    """The losses of the first step are those of plain cross entropies over one forward pass."""
    changes = {**talk, "batch": 1, "condition_dropout": 0, "schedule": {"steps": 1}, "learn_image_ends": True}
    config = make(**changes)
    torch.manual_seed(config.seed)
    assembly = initial_model(config, default_plugins(), "cpu")
    model, processor = assembly.model.eval(), assembly.processor
    blue, red = (open_image(data / f"{name}.png") for name in ("blue", "red"))
    given = [ImageInput(blue), ImageTarget(blue, supervised=False), Text("Make it red.")]
    answer = [Text("Here:", True), ImageTarget(red)]
    sequence = processor.sequence(
        Sample([Message("user", given), Message("assistant", answer)]), learn_image_ends=True
    )
    assert sequence.generation_supervised == [False, True]
    with torch.no_grad():
        batch = collate([sequence])
        targets = model.targets(batch)
        hidden = model.backbone(model.embed(batch, targets), positions=batch.positions)[0]
        labels = batch.labels[0]
        text = F.cross_entropy(model.backbone.logits(hidden)[labels != -100], labels[labels != -100])
        drawn = sequence.generation_mask.nonzero()[0][16:]  # of the second image
        logits = model.generation.head(hidden[drawn - 1], torch.empty(16, 0, dtype=torch.int64))
        image = F.cross_entropy(logits, targets[1])
    train(config, quiet=True)
    step = metrics(config)[0]
    learned = [
        processor.tokenizer.decode(labels[i : i + 1].numpy()) for i in (labels != -100).nonzero()[:, 0]
    ]
    assert labels[labels != IGNORE_INDEX].tolist()[-3:] == [
        processor.tokenizer.special_id(name) for name in ("begin_image", "end_image", "eos")
    ], learned
    assert step["loss/text"] == pytest.approx(float(text), rel=1e-4)
    assert step["loss/image"] == pytest.approx(float(image), rel=1e-4)


def test_answers_of_the_trained_model_may_begin_images(make, talk, tmp_path: Path) -> None:
    suppressed = {"model__processor__suppress_tokens": [BEGIN, END]}
    for learns in (False, True):
        output = str(tmp_path / f"learns-{learns}")
        changes = {**talk, **suppressed, "schedule": {"steps": 1}, "output": output}
        train(make(**changes, learn_image_ends=learns), quiet=True)
        janus = Janus.from_pretrained(f"{output}/model")
        assert (BEGIN in janus.processor.suppress_tokens) is not learns
        assert END in janus.processor.suppress_tokens
        assert (BEGIN in janus.model.config.processor.suppress_tokens) is not learns
        assert list(janus.runtime.suppressed_ids) == list(janus.processor.suppressed_ids)
