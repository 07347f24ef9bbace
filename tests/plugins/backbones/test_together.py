"""Bidirectional blocks: against a dense mask, in training and in sessions, and errors where unsupported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_modular import (
    CheckpointError,
    ConfigError,
    ImageInput,
    ImageTarget,
    Message,
    PromptError,
    Sample,
    Text,
    unconditional,
)
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.model.session import TorchRuntime
from janus_modular.plugins import Plugins
from janus_modular.sequence import Sequence
from janus_modular.testing import RuntimeContract
from janus_modular.testing.examples import prompt

CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 sums in another order; states are of size 1
IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8)) for i in range(2)
]
QUESTION = [Message("user", [Text("a"), ImageInput(IMAGES[0]), Text("b"), ImageInput(IMAGES[1]), Text("c")])]


def assemble(*overrides: str) -> ModelAssembly:
    torch.manual_seed(0)
    words = ["together=[understanding]", *overrides]
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", words), ModelConfig))
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    assembly.model.eval()
    return assembly


@pytest.fixture(scope="module")
def assembly(plugins_of_module: Plugins) -> ModelAssembly:
    return assemble()


@pytest.fixture(scope="module")
def plugins_of_module() -> Plugins:
    return Plugins([])


def with_blocks(*numbers: int) -> Sequence:
    sequence = prompt(*range(3, 3 + len(numbers)))
    sequence.together = np.array(numbers)
    return sequence


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_attention_under_a_dense_mask(attention: str):
    assembly = assemble(f"backbone.attention={attention}")
    sequence = assembly.processor.chat_prompt(QUESTION)
    model, batch = assembly.model, collate([sequence])
    x, length = model.embed(batch), len(sequence)
    seen = torch.zeros(length, length, dtype=torch.bool)
    images = np.flatnonzero(sequence.understanding_mask).reshape(2, -1)  # of 16 positions each
    for query in range(length):
        for key in range(length):
            in_image = any(query in image and key in image for image in images)
            seen[query, key] = key <= query or in_image
    decoder = model.backbone.model.model
    decoder.config._attn_implementation = "eager"
    mask = torch.where(seen, 0.0, -torch.inf)[None, None]
    expected = decoder(inputs_embeds=x, attention_mask=mask, position_ids=batch.positions, use_cache=False)[0]
    decoder.config._attn_implementation = attention
    torch.testing.assert_close(model.hidden(x, batch)[0], expected, **CLOSE)
    causal = model.backbone(x, positions=batch.positions)
    first = images[0][0]
    assert (causal[0, first] - expected[0, first]).abs().max() > 0.01
    session = Janus.of(assembly).runtime.open(length)
    torch.testing.assert_close(session.prefill([sequence]), expected[:, -1], **CLOSE)


def test_packed_sequences_have_the_losses_of_each(assembly: ModelAssembly):
    samples = [
        Sample([Message("user", [ImageInput(IMAGES[0]), Text("a")]), Message("assistant", [Text("bc")])]),
        Sample([Message("user", [ImageInput(IMAGES[1])]), Message("assistant", [Text("d")])]),
        Sample([Message("user", [Text("draw")]), Message("assistant", [ImageTarget(IMAGES[0])])]),
    ]
    sequences = [assembly.processor.sequence(sample) for sample in samples]
    with torch.no_grad():
        packed = assembly.model(collate([sequences])).losses
        alone = [assembly.model(collate([sequence])).losses for sequence in sequences]
    for name, losses in packed.items():
        expected = torch.cat([each[name] for each in alone if name in each])
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)  # float32 sums in another order


def test_a_dropped_condition_is_causal_in_training_and_in_sampling(assembly: ModelAssembly):
    processor = assembly.processor
    messages = [Message("user", [ImageInput(IMAGES[0]), Text("like this")])]
    drawn = processor.draw_prompt(messages)
    assert sorted(set(drawn.together.tolist())) == [0, 1]
    sample = Sample([*messages, Message("assistant", [ImageTarget(IMAGES[1])])])
    trained = processor.sequence(sample, condition_dropout=True)
    assert not trained.together.any()
    assert not unconditional(drawn, processor.pad_id).together.any()
    session = Janus.of(assembly).runtime.open(len(drawn))
    states = session.prefill([drawn, unconditional(drawn, processor.pad_id)])
    assert not torch.allclose(states[0], states[1])


class TestTorchKeepsTheContract(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_model(self, assembly: ModelAssembly) -> None:
        self.runtime = Janus.of(assembly).runtime

    def make(self) -> tuple[TorchRuntime, list[Sequence]]:
        return self.runtime, [with_blocks(0, 1, 1, 1, 0, 2, 2), with_blocks(1, 1)]


def test_a_block_is_not_divided(assembly: ModelAssembly):
    session = Janus.of(assembly).runtime.open(16, rows=2)
    session.admit([with_blocks(0, 1, 1, 1, 0), with_blocks(0, 0)], [0, 1])
    for length in (2, 3):
        with pytest.raises(
            PromptError, match=f"found length {length} for row 0; expected 1 or less, or 4 or more"
        ):
            session.truncate([length, 1])
        assert session.lengths.tolist() == [5, 2]
    session.truncate([1, 1])
    session.extend(torch.zeros(2, 2, session.hidden_size))
    session.truncate([2, 1])
    assert session.lengths.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.config.model_type=mistral", "backbone.config.sliding_window=8"], "'mistral'.*sliding"),
        (["backbone.attention=flex_attention"], "'flex_attention' takes no mask: choose sdpa or eager"),
        (["together=[generation]"], "expected a list, each one of 'understanding'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=f"(?s)together.*{message}"):
        assemble(*overrides)


def test_a_causal_backbone_is_refused_by_name(plugins: Plugins, monkeypatch: pytest.MonkeyPatch):
    from janus_plugins.backbones.hf import HfBackbone

    monkeypatch.delattr(HfBackbone, "refuse_together")
    monkeypatch.setattr("janus_modular.model.build.AttendsTogether", int)
    with pytest.raises(ConfigError, match=r"(?s)together.*'hf' does not support bidirectional.*causal"):
        assemble()


def test_prompts_and_batches_of_other_processors_are_refused(assembly: ModelAssembly):
    causal = ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig))
    theirs, ours = (each.processor.chat_prompt(QUESTION) for each in (causal, assembly))
    assert theirs.together is None
    for holder, sequence, found in (
        (causal, ours, "attend to each other; expected none"),
        (assembly, theirs, "no `to"),
    ):
        with pytest.raises(PromptError, match=found):
            Janus.of(holder).runtime.open(300).prefill([sequence])
        with pytest.raises(PromptError, match=found):
            holder.model(collate([sequence]))


@pytest.mark.parametrize("name", ["published", "transformers"])
def test_formats_that_cannot_say_it_refuse_it(plugins: Plugins, name: str, tmp_path: Any):
    entries = {entry: plugins.entry("formats", entry) for entry in plugins.names("formats")}
    written = [entry for key, entry in entries.items() if name in key]
    assert written
    for entry in written:
        with pytest.raises(CheckpointError, match=r"only causal attention \(together: \[\]\); found"):
            entry.factory(entry.config()).write_config({"together": ["understanding"]}, tmp_path)
