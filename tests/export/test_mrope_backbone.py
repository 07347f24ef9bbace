"""A third-party backbone with positions on three axes: trained, exported, verified and asked about images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.verify import verify
from janus_modular import (
    ConfigError,
    ImageInput,
    ImageTarget,
    Message,
    PositionRule,
    PromptError,
    Sample,
    Text,
)
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.model.session import TorchRuntime
from janus_modular.plugins import Plugins
from janus_modular.positions import RowPositions
from janus_modular.sequence import Sequence, unconditional
from janus_modular.testing import BackboneContract, RuntimeContract
from janus_modular.testing.examples import prompt

PLUGIN = Path(__file__).with_name("mrope_backbone.py")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 sums in another order; states are of size 1
GRID = (2, 3)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
needs_bundle = pytest.mark.slow  # its export takes as long as that of a whole model


def assemble(plugins: Plugins, **others: Any) -> ModelAssembly:
    plugins.add_file(PLUGIN)
    raw = {**load("model/tiny", plugins=plugins), "backbone": {"name": "mrope"}, **others}
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(raw, ModelConfig, plugins=plugins), plugins)
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return assembly


@pytest.fixture
def assembly(plugins: Plugins) -> ModelAssembly:
    return assemble(plugins)


@pytest.fixture
def checkpoint(shared: Path, plugins: Plugins, filled_once: Any) -> Path:
    assembly = assemble(plugins)
    return filled_once(shared / "mrope_checkpoint", lambda folder: save(assembly, folder, plugins=plugins))


@pytest.fixture
def bundle(shared: Path, checkpoint: Path, filled_once: Any) -> Path:
    config = ExportConfig(variants=["fp32"])
    return filled_once(shared / "mrope_bundle", lambda folder: export(checkpoint, folder, config))


def sequence_of(text: str) -> Sequence:
    """A letter is a text token, a digit an image of `GRID`: "aa1b" has an image behind two tokens."""
    is_image = np.concatenate([np.full(GRID[0] * GRID[1] if c.isdigit() else 1, c.isdigit()) for c in text])
    tokens, nothing = np.arange(len(is_image)), np.zeros(len(is_image), np.bool_)
    return Sequence(tokens, np.full(len(tokens), -100), is_image, nothing)


@pytest.mark.parametrize("text", ["abc", "aa1b", "1ab", "a1b2c", "ab1"])
def test_ids_are_those_of_transformers(text: str):
    sequence = sequence_of(text)
    config = Qwen2VLConfig(vision_config={"spatial_merge_size": 1})
    images = sum(c.isdigit() for c in text)
    with torch.device("meta"):
        index_of = Qwen2VLModel(config).get_rope_index
    kinds = torch.from_numpy(sequence.understanding_mask.astype(np.int32))[None]
    grids = torch.tensor([[1, *GRID]] * images) if images else None
    expected, delta = index_of(torch.from_numpy(sequence.tokens)[None], kinds, grids)
    ids = PositionRule(["temporal", "height", "width"], GRID).ids(sequence)
    assert np.array_equal(ids, expected[:, 0].numpy())
    row = RowPositions.of_prompts(3, [Sequence(**{**vars(sequence), "position_ids": ids})])
    following = row.of(np.array([[len(sequence)]]))
    assert following[1:, 0, 0].tolist() == [len(sequence) + int(delta[0])] * 3


def test_neighbouring_images_have_places_of_their_own():
    """Transformers takes images without a token between them for one."""
    ids = PositionRule(["height", "width"], GRID).ids(sequence_of("a12b"))
    assert ids[0].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 4, 4, 5, 5, 5, 7]
    assert ids[1].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]


class TestItsContract(BackboneContract):
    @pytest.fixture(autouse=True)
    def _of_plugins(self, plugins: Plugins) -> None:
        plugins.add_file(PLUGIN)
        self.entry = plugins.entry("backbones", "mrope")

    def make(self) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(0)
        return self.entry.factory(self.entry.config()), torch.randint(320, (3, 7))


@torch.no_grad()
def test_it_computes_what_transformers_computes(assembly: ModelAssembly):
    conversation = [Message("user", [Text("see"), ImageInput(IMAGE), Text("this")])]
    prompts = assembly.processor.chat_prompt(conversation)
    batch, model = collate([prompts]), assembly.model.eval()
    x = model.embed(batch)
    positions = model.positions(batch)
    assert positions.shape == (4, 1, len(prompts))
    assert len({tuple(axis.flatten().tolist()) for axis in positions}) == 4
    expected = model.backbone.model(inputs_embeds=x, position_ids=positions, use_cache=False)[0]
    torch.testing.assert_close(model.backbone(x, positions=positions), expected, **CLOSE)


def test_packed_sequences_have_the_losses_of_each(assembly: ModelAssembly):
    sample = [
        Sample([Message("user", [ImageInput(IMAGE), Text("a")]), Message("assistant", [Text("bc")])]),
        Sample([Message("user", [Text("draw")]), Message("assistant", [ImageTarget(IMAGE)])]),
        Sample([Message("user", [Text("b")]), Message("assistant", [Text("d")])]),
    ]
    sequences = [assembly.processor.sequence(each) for each in sample]
    packed = assembly.model(collate([sequences, sequences[::-1]])).losses
    for name, losses in packed.items():
        alone = [assembly.model(collate([sequence])).losses for sequence in sequences]
        expected = torch.cat([each[name] for each in (*alone, *alone[::-1]) if name in each])
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)  # float32 sums in another order
    packed["text"].mean().backward()
    assert all(weight.grad is not None for weight in assembly.model.backbone.parameters())


def test_guidance_keeps_the_positions_of_the_condition(assembly: ModelAssembly):
    janus = Janus.of(assembly)
    messages = [Message("user", [ImageInput(IMAGE), Text("like this")])]
    sequence = janus.processor.draw_prompt(messages)
    row = unconditional(sequence, janus.processor.pad_id)
    assert np.array_equal(row.position_ids, sequence.position_ids)
    trained = janus.processor.sequence(
        Sample([*messages, Message("assistant", [ImageTarget(IMAGE)])]), condition_dropout=True
    )
    assert np.array_equal(trained.position_ids[:, : len(row)], row.position_ids)
    drawn = trained.position_ids[:, len(row) : len(row) + 16]
    assert np.array_equal(drawn - row.position_ids.max(), np.tile(np.arange(1, 17), (3, 1)))


@torch.no_grad()
def test_a_session_goes_on_behind_an_image_and_is_cut_back_into_it(assembly: ModelAssembly):
    janus = Janus.of(assembly)
    sequence = janus.processor.chat_prompt([Message("user", [ImageInput(IMAGE), Text("what?")])])
    model, length = assembly.model.eval(), len(sequence)
    x = model.embed(collate([sequence]))
    more = torch.randn(1, 3, x.shape[2])
    for kept in (length, length - 4, int(sequence.understanding_mask.argmax()) + 6):
        ids = sequence.position_ids[:, :kept]
        following = ids.max() + 1 + np.arange(3)
        all_ids = np.concatenate([ids, np.tile(following, (3, 1))], axis=1)
        positions = torch.from_numpy(np.concatenate([np.arange(kept + 3)[None], all_ids]))[:, None]
        expected = model.backbone(torch.cat([x[:, :kept], more], dim=1), positions=positions)
        session = janus.runtime.open(length + 3)
        session.prefill([sequence])
        session.truncate([kept])
        torch.testing.assert_close(session.extend(more), expected[:, kept:], **CLOSE)


class TestItsSessionsInTorch(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_model(self, assembly: ModelAssembly) -> None:
        self.runtime = Janus.of(assembly).runtime

    def make(self) -> tuple[TorchRuntime, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3), prompt(4)]


@needs_bundle
class TestItsSessionsInOnnxRuntime(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_bundle(self, bundle: Path) -> None:
        self.runtime = Janus.from_pretrained(bundle).runtime

    def make(self) -> tuple[Any, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3), prompt(4)]


@needs_bundle
@pytest.mark.parametrize("runtime", ["onnx", "tensorrt"])
def test_its_bundle_answers_and_draws_as_torch_does(
    checkpoint: Path, bundle: Path, tmp_path: Path, runtime: str, machine: Any, build_engines: Any
):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    if runtime == "tensorrt":
        build_engines(folder, "fp32", "tensorrt")
    opened = Janus.from_pretrained(checkpoint)
    exported = Janus.from_pretrained(folder, runtime={"name": runtime, "chunk": 7})
    assert exported.chat("what?", [IMAGE], max_tokens=6) == opened.chat("what?", [IMAGE], max_tokens=6)
    expected, images = (janus.draw(["a", "two dogs"], 1, seed=3) for janus in (opened, exported))
    assert np.array_equal(np.stack(images.encoded), np.stack(expected.encoded))
    conversation = [Message("user", [Text("see"), ImageInput(IMAGE), Text("this")])]
    sequence = opened.processor.chat_prompt(conversation)
    assert np.array_equal(exported.processor.chat_prompt(conversation).position_ids, sequence.position_ids)
    states = [
        session.to_host(session.prefill([sequence, prompt(1, 2)]))
        for session in (janus.runtime.open(len(sequence)) for janus in (opened, exported))
    ]
    np.testing.assert_allclose(states[1], states[0], rtol=0, atol=1e-4)  # float32 sums in another order


@needs_bundle
@pytest.mark.parametrize("layers", [False, True])
def test_its_bundle_is_verified(checkpoint: Path, bundle: Path, tmp_path: Path, layers: bool):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    assert load_bundle(folder).manifest["graphs"]["backbone"]["inputs"][1]["shape"] == [4, "rows", "tokens"]
    [report] = verify(folder, checkpoint, variants=["fp32"], layers=layers)
    assert report.failures == ""


def test_what_has_no_grid_or_no_ids_is_refused(
    plugins: Plugins, assembly: ModelAssembly, monkeypatch: pytest.MonkeyPatch
):
    raw = load("model/tiny", plugins=plugins)
    raw["understanding"]["adaptor"] = {"name": "perceiver", "queries": 7}
    queries = assemble(plugins, understanding=raw["understanding"])
    assert queries.processor.positions.grid == (1, 7)
    sequence = assembly.processor.chat_prompt([Message("user", [ImageInput(IMAGE), Text("what?")])])
    bare = Sequence(**{**vars(sequence), "position_ids": None})
    session = Janus.of(assembly).runtime.open(300)
    with pytest.raises(PromptError, match="found position ids on 0 axes; expected 3"):
        session.prefill([bare])
    with pytest.raises(PromptError, match="position ids on 0 axes; expected 3"):
        assembly.model(collate([bare]))
    counting = ModelAssembly.from_config(resolve(load("tiny"), ModelConfig))
    with pytest.raises(PromptError, match="found position ids on 3 axes; expected 0"):
        Janus.of(counting).runtime.open(300).prefill([sequence])
    monkeypatch.setattr("janus_modular.model.understanding.ReshapesGrid", int)  # as if none were declared
    with pytest.raises(ConfigError, match=r"makes 7 positions.*no output_grid; expected rows and columns"):
        assemble(plugins, understanding=raw["understanding"])
