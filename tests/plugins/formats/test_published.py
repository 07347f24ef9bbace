"""The published format: every tensor is read to its native name, and written back bit-identically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from janus_modular import CheckpointError
from janus_modular.checkpoints import ModelAssembly, convert
from janus_modular.checkpoints.opening import build_format, open_lazily
from janus_modular.cli.info import gather
from janus_modular.config import to_plain
from janus_modular.plugins import Plugins
from janus_modular.testing import CheckpointFormatContract, CheckpointFormatExample
from janus_modular.weights.chunks import chunk_name, sharding_metadata
from janus_plugins.formats.published import NAMES, PublishedConfig, PublishedFormat
from janus_plugins.formats.published_config import read_config, write_config

REFERENCE = Path(__file__).parents[2] / "fixtures" / "reference"
UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")


def unused(name: str) -> bool:
    return name.startswith(UNUSED)


def changed(folder: Path, file: str, change: Callable[[Any], None]) -> Path:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def native(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "model"
    convert(published, folder)
    return folder


def test_every_tensor_arrives(published: Path, reference: dict[str, Tensor]) -> None:
    assembly = ModelAssembly.from_checkpoint(published)
    model, processor = assembly.model, assembly.processor
    state = model.state_dict()
    tower, layer = "vision_model.vision_tower", "understanding.encoder.model.encoder.layers.1.self_attn"
    for theirs, ours in (
        ("aligner.layers.2.bias", "understanding.adaptor.layers.2.bias"),
        ("gen_vision_model.decoder.conv_blocks.1.res.0.conv1.weight",) * 2,
        ("gen_embed.weight", "generation.embedding.weight"),
        ("gen_head.vision_head.weight", "generation.head.vision_head.weight"),
        ("language_model.lm_head.weight", "backbone.model.lm_head.weight"),
        (
            "language_model.model.layers.2.mlp.up_proj.weight",
            "backbone.model.model.layers.2.mlp.up_proj.weight",
        ),
    ):
        name = ours.replace("gen_vision_model", "generation.tokenizer")
        assert torch.equal(state[name], reference[theirs])
    fused = reference[f"{tower}.blocks.1.attn.qkv.weight"]
    assert torch.equal(torch.cat([state[f"{layer}.{x}_proj.weight"] for x in "qkv"]), fused)
    assert torch.equal(
        state["understanding.encoder.model.embeddings.position_embedding.weight"],
        reference[f"{tower}.pos_embed"][0],
    )
    used = sum(tensor.numel() for name, tensor in reference.items() if not unused(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == used
    assert processor.template_name == "janus-pro"
    assert processor.image_tokens == 576
    assert processor.drawing is not None
    assert processor.drawing.num_tokens == 576
    assert not model.training


def test_native_and_back_is_bit_exact(native: Path, reference: dict[str, Tensor], tmp_path: Path) -> None:
    convert(native, tmp_path / "back", format_name="published")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in reference.items()
    }
    for name, tensor in back.items():
        assert torch.equal(tensor, torch.zeros(()).expand_as(tensor) if unused(name) else reference[name]), (
            name
        )
    again, first = open_lazily(tmp_path / "back"), open_lazily(native)
    assert again.processor.to_dict() == first.processor.to_dict()
    strings = again.processor.tokenizer.special
    assert strings == first.processor.tokenizer.special


@pytest.mark.slow
def test_chunks_of_two_processes_are_written_as_whole_tensors_are(native: Path, tmp_path: Path) -> None:
    shutil.copytree(native, tmp_path / "chunked")
    (tmp_path / "chunked/model.safetensors").unlink()
    tensors = load_file(native / "model.safetensors")
    for rank in range(2):
        chunks = {name: tensor.chunk(2)[rank].clone() for name, tensor in tensors.items() if len(tensor) > 1}
        starts = {name: [rank * ((len(tensors[name]) + 1) // 2)] for name in chunks}
        if not rank:
            chunks |= {name: tensor for name, tensor in tensors.items() if len(tensor) == 1}
        offsets = {name: starts.get(name, [0]) + [0] * (x.ndim - 1) for name, x in chunks.items()}
        file = tmp_path / "chunked" / chunk_name("model", rank, 2)
        save_file(chunks, file, sharding_metadata(offsets))
    for source in (native, tmp_path / "chunked"):
        convert(source, tmp_path / f"from-{source.name}", format_name="published")
    first, second = (tmp_path / f"from-{name}/model.safetensors" for name in ("chunked", native.name))
    assert first.read_bytes() == second.read_bytes()


def test_transformers_and_back_is_bit_exact(native: Path, tmp_path: Path) -> None:
    convert(native, tmp_path / "theirs", format_name="transformers")
    convert(tmp_path / "theirs", tmp_path / "back")
    old, new = load_file(native / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert open_lazily(tmp_path / "back").processor.to_dict() == open_lazily(native).processor.to_dict()


def test_sharded_pickles_in_half_precision(
    reference: dict[str, Tensor], native: Path, description: Path
) -> None:
    names = list(reference)
    where = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: reference[name].bfloat16() for name in names[i::2]}, description / file)
        where |= dict.fromkeys(names[i::2], file)
    index = {"metadata": {}, "weight_map": where}
    (description / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = ModelAssembly.from_checkpoint(description, dtype=torch.bfloat16).model
    stored = load_file(native / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name].bfloat16()), name


def test_anything_else_left_over_is_an_error(reference: dict[str, Tensor], description: Path) -> None:
    tensors = reference | {"language_model.model.layers.0.adapter": torch.zeros(2), "ema": torch.zeros(1)}
    del tensors["gen_aligner.layers.2.bias"]
    save_file(tensors, description / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        ModelAssembly.from_checkpoint(description)
    text = str(error.value)
    assert "1 unexpected in backbone:\n    backbone.model.model.layers.0.adapter" in text
    assert "1 unexpected:\n    ema" in text
    assert "1 missing in generation.adaptor:\n    generation.adaptor.layers.2.bias" in text


def test_a_partial_llama_config_takes_llamas_defaults(description: Path) -> None:
    def partial(config: dict[str, Any]) -> None:
        config["language_config"] = {"hidden_size": 64, "vocab_size": 512, "torch_dtype": "bfloat16"}
        config["language_config"] |= {"_attn_implementation": "flash_attention_2", "rope_theta": 5000.0}

    backbone = read_config(changed(description, "config.json", partial))["backbone"]
    from janus_plugins.backbones.decoder_config import decoder_config
    from janus_plugins.backbones.hf import HfConfig

    llama = decoder_config(HfConfig(config=backbone["config"]))
    assert (llama.intermediate_size, llama.num_hidden_layers, llama.num_attention_heads) == (11008, 32, 32)
    assert (llama.num_key_value_heads, llama.max_position_embeddings, llama.rms_norm_eps) == (32, 2048, 1e-6)
    assert llama.rope_parameters["rope_theta"] == 5000.0
    assert not llama.tie_word_embeddings
    assert llama._attn_implementation_internal is None


def test_janus_1b3_is_recognised_by_its_preprocessor(description: Path) -> None:
    def of_1b3(config: dict[str, Any]) -> None:
        config |= {"do_normalize": False, "image_mean": [0.48145466, 0.4578275, 0.40821073]}
        config["background_color"] = [122, 116, 104]

    read = read_config(changed(description, "preprocessor_config.json", of_1b3))
    pixels = read["understanding"]["encoder"]["pixels"]
    assert (pixels["normalize"], pixels["fill"]) == (False, [122, 116, 104])
    assert read["processor"]["template"] == "janus"
    template = describe_without_weights(description, "processor.template=janus-pro")
    assert template == "janus-pro"


def describe_without_weights(folder: Path, override: str) -> str:
    save_file({}, folder / "model.safetensors")
    return open_lazily(folder, overrides=[override]).processor.template_name


def test_a_tokenizer_without_roles_is_janus(description: Path) -> None:
    def no_roles(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if "Assistant" not in t["content"]]

    assert read_config(changed(description, "tokenizer.json", no_roles))["processor"]["template"] == "janus"


def test_a_tower_that_normalises_once_more(description: Path) -> None:
    def tower(config: dict[str, Any]) -> None:
        config["vision_config"]["params"] |= {"pixel_mean": [0.1, 0.2, 0.3], "pixel_std": [2.0, 2.0, 4.0]}

    pixels = read_config(changed(description, "config.json", tower))["understanding"]["encoder"]["pixels"]
    x = torch.rand(3, dtype=torch.float64)
    twice = ((x - 0.5) / 0.5 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([2.0, 2.0, 4.0])
    once = (x - torch.tensor(pixels["mean"])) / torch.tensor(pixels["std"])
    torch.testing.assert_close(once, twice, atol=1e-6, rtol=0)  # float32 constants
    assert pixels["fill"] == [127, 127, 127]


def test_the_published_hybrid_adaptor() -> None:
    section = {"projector_type": "low_high_hybrid_split_mlp_gelu", "depth": 3}
    from janus_plugins.formats.published_config import _read_adaptor, _write_adaptor

    assert _read_adaptor({"params": section}) == {"name": "hybrid", "depth": 3}
    written = _write_adaptor("aligner", {"name": "hybrid", "depth": 3}, 1024, 2048)
    assert written["params"] == section | {"input_dim": 1024, "n_embed": 2048}
    for name in ("high_up_proj.weight", "low_up_proj.bias", "layers.1.weight", "layers.3.bias"):
        assert NAMES.to_native(f"aligner.{name}") == f"understanding.adaptor.{name}"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("vision_config", "cls"), "HybridVisionTower", "HybridVisionTower"),
        (("vision_config", "params", "model_name"), "sam_b_downsample", "sam_b_downsample"),
        (("vision_config", "params", "select_feature"), "patch", "patch"),
        (("aligner_config", "params", "projector_type"), "resampler", "resampler"),
        (("gen_vision_config", "cls"), "VQ-8", "VQ-8"),
    ],
)
def test_names_what_it_has_no_part_for(
    keys: tuple[str, ...], value: str, message: str, description: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    with pytest.raises(CheckpointError, match=f"the published format supports only .*{message}"):
        read_config(changed(description, "config.json", change))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("understanding.encoder.feature_dim", 768),
        ("understanding.encoder.activation", "gelu_pytorch_tanh"),
        ("understanding.encoder.pixels.resize", "crop"),
        ("understanding.encoder.pixels.fill", [0, 0, 0]),
        ("understanding.adaptor.name", "perceiver"),
        ("generation.height", 256),
        ("generation.tokenizer.channels", 64),
        ("generation.tokenizer.name", "vq"),
        ("backbone.config.model_type", "qwen3"),
    ],
)
def test_says_what_it_cannot_hold(path: str, value: object, native: Path, tmp_path: Path) -> None:
    config = json.loads((native / "config.json").read_text())["model"]
    *keys, last = path.split(".")
    at = config
    for key in keys:
        at = at[key]
    at[last] = value
    with pytest.raises(CheckpointError, match="the published format supports only "):
        write_config(config, tmp_path)


def test_rope_is_written_in_the_keys_of_its_time(native: Path, tmp_path: Path) -> None:
    config = json.loads((native / "config.json").read_text())["model"]
    scaled = {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}
    config["backbone"]["config"]["rope_parameters"] = scaled
    write_config(config, tmp_path)
    language = json.loads((tmp_path / "config.json").read_text())["language_config"]
    assert language["rope_theta"] == 500000.0
    assert language["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    from janus_plugins.backbones.decoder_config import decoder_config
    from janus_plugins.backbones.hf import HfConfig

    again = decoder_config(HfConfig(config=language)).rope_parameters
    assert {key: again[key] for key in scaled} == scaled


def test_a_tied_head_is_written_for_a_strict_load() -> None:
    embed = torch.randn(4, 2)
    ours = {
        "backbone.model.model.embed_tokens.weight": embed,
        "understanding.encoder.model.embeddings.patch_embedding.weight": torch.zeros(8, 3, 2, 2),
        "understanding.encoder.model.encoder.layers.0.mlp.fc1.weight": torch.zeros(16, 8),
    }
    theirs = dict(PublishedFormat(PublishedConfig()).from_native(ours))
    assert torch.equal(theirs["language_model.lm_head.weight"], embed)
    assert theirs["vision_model.vision_tower.attn_pool.mlp.fc1.weight"].shape == (16, 8)


def test_a_folder_that_lacks_files_says_which(description: Path) -> None:
    (description / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no file .*preprocessor_config\.json"):
        open_lazily(description)


def test_converting_onto_itself_or_onto_something_else_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is the checkpoint to convert"):
        convert(published, published, format_name="published")
    shutil.copytree(published, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CheckpointError, match="no janus-modular checkpoint"):
        convert(published, tmp_path / "other")


class TestPublishedFormatKeepsTheContract(CheckpointFormatContract):
    @pytest.fixture(autouse=True)
    def _of_the_reference(self, reference: dict[str, Tensor]) -> None:
        self.weights = reference

    def make(self) -> tuple[PublishedFormat, CheckpointFormatExample]:
        config = json.loads((REFERENCE / "config.json").read_text())
        return PublishedFormat(PublishedConfig()), CheckpointFormatExample(config, self.weights)


def test_info_counts_the_numbers_that_a_model_does_not_use(
    published: Path, reference: dict[str, Tensor]
) -> None:
    stored = gather(str(published), [])["stored"]
    assert stored["unused"] == sum(tensor.numel() for name, tensor in reference.items() if unused(name)) > 0
    assert sum(stored.values()) == sum(tensor.numel() for tensor in reference.values())


@pytest.mark.parametrize("name", ["published", "transformers"])
def test_images_that_begin_without_a_token_are_refused(
    name: str, published: Path, tmp_path: Path, plugins: Plugins
) -> None:
    assembly = ModelAssembly.from_checkpoint(published, device="meta")
    config = to_plain(assembly.model.config)
    config["processor"]["tokens"] = {**assembly.processor.tokenizer.names, "begin_image": None}
    with pytest.raises(CheckpointError, match=r"images that begin with a token \(tokens\.begin_image\)"):
        build_format(name, plugins).write_config(config, tmp_path)


def test_a_begin_embedding_is_refused(published: Path, tmp_path: Path, plugins: Plugins) -> None:
    assembly = ModelAssembly.from_checkpoint(published, device="meta")
    config = to_plain(assembly.model.config)
    config["processor"]["tokens"] = assembly.processor.tokenizer.names
    config["understanding"]["adaptor"] = {"name": "linear", "bias": True, "begin": True}
    with pytest.raises(CheckpointError, match="a linear adaptor without a begin embedding"):
        build_format("published", plugins).write_config(config, tmp_path)
