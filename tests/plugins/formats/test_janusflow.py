"""JanusFlow's format, and what its published code computes: tests/fixtures/flow, see its README."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from janus_modular import CheckpointError, Janus
from janus_modular.checkpoints import ModelAssembly, convert
from janus_modular.checkpoints.opening import build_format, open_lazily
from janus_modular.config import to_plain
from janus_modular.model.batch import collate
from janus_modular.model.model import merge_features
from janus_modular.model.session import TorchRuntime
from janus_modular.plugins import Plugins
from janus_modular.sequence import ImageInput, Message, Sequence, Text
from janus_plugins.image_autoencoders.autoencoder_kl import AutoencoderKl, AutoencoderKlConfig
from janus_plugins.samplers.rectified_flow import FlowSettings, follow, unconditional

FIXTURES = Path(__file__).parents[2] / "fixtures"
FLOW, REFERENCE = FIXTURES / "flow", FIXTURES / "reference"
EXPECTED = np.load(FLOW / "expected.npz")
KEYS = json.loads((FLOW / "keys.json").read_text())
SMALL = {"channels": 8, "channel_multipliers": [1, 1, 1, 1], "residual_blocks": 1}
PAD = 3


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder with the factor of the published one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    state = AutoencoderKl(AutoencoderKlConfig(**SMALL)).state_dict()  # type: ignore[arg-type]
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the fixture stands for."""
    sys.path[:0] = [str(FLOW), str(REFERENCE)]
    from flow_weights import flow_tensor

    del sys.path[:2]
    folder = tmp_path_factory.mktemp("janusflow") / "model"
    other = shutil.ignore_patterns("*.npz", "*.py", "*.md", "*.png", "keys.json")
    shutil.copytree(REFERENCE, folder, ignore=other)
    shutil.copy(FLOW / "config.json", folder)
    weights = {key: torch.from_numpy(flow_tensor(key, tuple(shape))) for key, shape in KEYS.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def overrides(autoencoder: Path) -> list[str]:
    path = "generation.autoencoder"
    return [f"{path}.pretrained={autoencoder}", *(f"{path}.{key}={value}" for key, value in SMALL.items())]


@pytest.fixture
def assembly(published: Path, autoencoder: Path) -> ModelAssembly:
    return ModelAssembly.from_checkpoint(published, overrides=overrides(autoencoder))


def difference(actual: Any, name: str) -> float:
    expected = EXPECTED[name]
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@torch.no_grad()
def test_text_logits_behind_an_image(assembly: ModelAssembly) -> None:
    model: Any = assembly.model
    image = Image.open(REFERENCE / "astronaut.png").convert("RGB")
    prompt = assembly.processor.chat_prompt([Message("user", [ImageInput(image), Text("What is it?")])])
    ids = torch.from_numpy(EXPECTED["und_input_ids"])
    features = model.understanding(collate([prompt]).understanding_pixels)
    assert features.shape[1] == int((ids == 6).sum()) == int(prompt.understanding_mask.sum()) == 577
    x = merge_features(features, model.backbone.embed(ids), mask=ids == 6)
    hidden = model.backbone(x, positions=torch.arange(ids.shape[1])[None])
    assert difference(model.backbone.logits(hidden[0, -1]), "und_last_logits") < 1e-4


def drawing_rows() -> list[Sequence]:
    """The fixture's prompt, without its last id, for which the embedding of the time stands."""
    ids = EXPECTED["gen_prompt_ids"][:-1]
    no_images = np.zeros(len(ids), np.bool_)
    prompt = Sequence(ids, np.full(len(ids), -100), no_images, no_images.copy())
    return [prompt, unconditional(prompt, PAD, hidden=True)]


def check_drawing(session: Any) -> None:
    """Draw with the sampler's loop; compare the velocities of each step, and the encoded image."""
    velocities: dict[str, Any] = {}
    run = session.run

    def recorded(name: str, *inputs: Any) -> Any:
        result = run(name, *inputs)
        if name == "advance":
            *others, mixture, time, step, _ = inputs
            moved = run(name, *others, mixture, time, step, np.float32(1))  # along the conditional velocity
            before, guided, conditional = (
                x if isinstance(x, np.ndarray) else session.to_host(x) for x in (mixture, result, moved)
            )
            number = round(float(time / step))
            velocities[f"v_cond_{number}"] = (conditional - before) / step
            velocities[f"v_uncond_{number}"] = (2 * conditional - guided - before) / step  # v = 2 c - u
        return result

    session.run = recorded
    steps = follow(session, drawing_rows(), EXPECTED["z0"], FlowSettings(guidance=2, steps=4))
    try:
        while True:
            next(steps)
    except StopIteration as end:
        drawn = session.to_host(end.value)
    assert len(velocities) == 8
    for name, velocity in velocities.items():
        assert difference(velocity[0, :, ::4, ::4], name) < 1e-4
    assert difference(drawn, "z_final") < 1e-4


@pytest.mark.slow
def test_drawing_in_torch(assembly: ModelAssembly) -> None:
    model: Any = assembly.model
    runtime = TorchRuntime(model, pad=PAD)
    positions = len(EXPECTED["gen_prompt_ids"]) - 1 + model.generation.num_tokens
    check_drawing(runtime.open(positions, 2))
    with torch.no_grad():
        mixture = torch.from_numpy(EXPECTED["z0"])
        _, embedded = model.generation.encoder(mixture, torch.tensor([0.25]))
    assert difference(embedded[0, ::8], "step1_t_emb_sub") < 1e-4


@pytest.mark.slow
def test_drawing_in_onnx_runtime(assembly: ModelAssembly, published: Path, tmp_path: Path) -> None:
    from janus_export.onnx_export.export import export

    Janus.of(assembly).save_pretrained(tmp_path / "native")
    export(tmp_path / "native", tmp_path / "bundle")
    janus = Janus.from_pretrained(tmp_path / "bundle", device="cpu")
    positions = len(EXPECTED["gen_prompt_ids"]) - 1 + 577
    check_drawing(janus.runtime.open(positions, 2))


def test_every_weight_comes_back_bit_for_bit(
    published: Path, autoencoder: Path, tmp_path: Path, plugins: Plugins
) -> None:
    convert(published, tmp_path / "native", overrides=overrides(autoencoder))
    convert(tmp_path / "native", tmp_path / "again", format_name="janusflow")
    written = load_file(tmp_path / "again" / "model.safetensors")
    unused = "vision_und_enc_model.vision_tower.attn_pool."
    for name, weight in load_file(published / "model.safetensors").items():
        assert torch.equal(written[name], torch.zeros_like(weight) if name.startswith(unused) else weight), (
            name
        )
    vae = load_file(autoencoder / "model.safetensors")
    assert {name for name in written if name not in KEYS} == {f"vae.{name}" for name in vae}
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    for section, described in json.loads((published / "config.json").read_text()).items():
        if section.startswith("vision_gen"):
            assert config[section] == described
    again = open_lazily(tmp_path / "again")
    assert again.format_name == "janusflow"
    assert again.model.config.generation.config.autoencoder.config.pretrained is None


def test_two_formats_of_the_same_model_type_are_distinguished(plugins: Plugins) -> None:
    janus = json.loads((REFERENCE / "config.json").read_text())
    flow = json.loads((FLOW / "config.json").read_text())
    assert janus["model_type"] == flow["model_type"]
    for config, expected in ((janus, "published"), (flow, "janusflow")):
        detected = [name for name in plugins.names("formats") if build_format(name, plugins).detect(config)]
        assert detected == [expected]


def test_a_checkpoint_without_a_reachable_autoencoder_says_where_it_comes_from(
    published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'stabilityai/sdxl-vae' is no file or folder here"):
        open_lazily(published)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_gen_enc_config", {"kernel_size": 4}, "patches of 2 x 2 without padding"),
        ("vision_gen_dec_config", {"norm_eps": 1e-5}, "norms of 1e-6"),
        ("vision_gen_enc_config", {"block_out_channels": [768, 768]}, "one resolution"),
    ],
)
def test_another_architecture_is_refused(
    tmp_path: Path, plugins: Plugins, section: str, change: dict[str, Any], message: str
) -> None:
    for file in (FLOW / "config.json", REFERENCE / "preprocessor_config.json"):
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[section]["params"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        build_format("janusflow", plugins).read_config(tmp_path)


def config_of(assembly: ModelAssembly, **generation: Any) -> dict[str, Any]:
    """Return the config that a format writes, with other options of the generation path."""
    config = to_plain(assembly.model.config)
    config["generation"] |= generation
    config["processor"]["tokens"] = assembly.processor.tokenizer.names
    return config


def test_options_and_weights_of_training_come_back(
    assembly: ModelAssembly, published: Path, plugins: Plugins, tmp_path: Path
) -> None:
    janusflow = build_format("janusflow", plugins)
    chosen = {"align_layer": 1, "align_dim": 1024, "align_weight": 0.25, "time_mean": -0.5, "time_std": 2.0}
    shutil.copytree(published, tmp_path / "written", ignore=shutil.ignore_patterns("*.safetensors"))
    janusflow.write_config(config_of(assembly, **chosen), tmp_path / "written")
    read = janusflow.read_config(tmp_path / "written")["generation"]
    assert {key: read[key] for key in chosen} == chosen
    weights = {"generation.aligner.0.weight": torch.ones(2, 2), **open_weights_of_tower(assembly)}
    written = dict(janusflow.from_native(weights))
    assert dict(janusflow.to_native(written))["generation.aligner.0.weight"] is written["aligner.0.weight"]


def open_weights_of_tower(assembly: ModelAssembly) -> dict[str, torch.Tensor]:
    """Return the weights that the format needs in any model."""
    state = assembly.model.state_dict()
    names = ("understanding.encoder.model.", "backbone.model.lm_head.")
    return {name: weight for name, weight in state.items() if name.startswith(names)}


def test_a_seen_condition_cannot_be_written(
    assembly: ModelAssembly, plugins: Plugins, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="janusflow format supports only hidden_condition"):
        build_format("janusflow", plugins).write_config(config_of(assembly, hidden_condition=False), tmp_path)


@pytest.mark.parametrize("name", ["published", "transformers"])
def test_formats_of_janus_refuse_rectified_flow(
    name: str, assembly: ModelAssembly, plugins: Plugins, tmp_path: Path
) -> None:
    config = config_of(assembly)
    config["processor"]["tokens"] = {**config["processor"]["tokens"], "begin_image": "<begin_of_image>"}
    with pytest.raises(CheckpointError, match="only the generation path autoregressive"):
        build_format(name, plugins).write_config(config, tmp_path)
