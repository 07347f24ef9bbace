"""transformers' format, against transformers' own JanusForConditionalGeneration on random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor

from janus_modular import CheckpointError, ImageInput, Message, Text
from janus_modular.checkpoints import ModelAssembly, convert
from janus_modular.checkpoints.opening import open_lazily
from janus_modular.testing import CheckpointFormatContract, CheckpointFormatExample
from janus_plugins.formats.transformers_config import _ratio, write_config
from janus_plugins.formats.transformers_janus import TransformersConfig, TransformersFormat

REFERENCE = Path(__file__).parents[2] / "fixtures" / "reference"

CASES: dict[str, dict[str, Any]] = {
    "untied, grouped keys": {
        "text": {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
        "vision": {"num_hidden_layers": 3, "depth": 2},
        "vq": {"channel_multiplier": [1, 2, 2]},
    },
    "tied, deep adaptors": {
        "text": {"num_hidden_layers": 1, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "vision": {"num_hidden_layers": 1, "depth": 4},
        "vq": {"channel_multiplier": [1, 1, 1], "num_hidden_layers": 3, "num_res_blocks": 1},
    },
    "untied, shallow adaptors, odd widths": {
        "text": {"num_hidden_layers": 3, "num_key_value_heads": 1, "tie_word_embeddings": False},
        "vision": {"num_hidden_layers": 2, "depth": 1, "mlp_ratio": 3.7362},
        "vq": {"channel_multiplier": [1, 2], "num_hidden_layers": 1, "embed_dim": 4},
    },
}


def reference_of(case: dict[str, Any]) -> JanusForConditionalGeneration:
    width = 64
    torch.manual_seed(0)
    tied = case["text"]["tie_word_embeddings"]
    text = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 1024,
        "max_position_embeddings": 512,
    }
    vision = {"hidden_size": 48, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    vq = {"base_channels": 32, "latent_channels": 16, "num_embeddings": 128, "image_token_embed_dim": width}
    config = JanusConfig(
        text_config=text | case["text"],
        vision_config=vision | {"projection_dim": width} | case["vision"],
        vq_config={"embed_dim": 8, "projection_dim": width} | vq | case["vq"],
        image_token_id=6,
        tie_word_embeddings=tied,
    )
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():  # norms and biases start alike: a swapped pair would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    return model


def add_processor(folder: Path) -> None:
    """Put the files of a processor beside weights."""
    for file in REFERENCE.glob("*token*.json"):
        shutil.copy(file, folder)
    preprocessor = json.loads((REFERENCE / "preprocessor_config.json").read_text())
    del preprocessor["image_size"]
    preprocessor["size"] = {"height": 32, "width": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


@pytest.fixture
def reference(case: dict[str, Any]) -> JanusForConditionalGeneration:
    return reference_of(case)


@pytest.fixture
def folder(reference: JanusForConditionalGeneration, tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    reference.save_pretrained(folder)
    add_processor(folder)
    return folder


@torch.no_grad()
def test_computes_what_transformers_computes(reference: JanusForConditionalGeneration, folder: Path) -> None:
    reopened = ModelAssembly.from_checkpoint(folder)
    ours, processor = reopened.model, reopened.processor
    assert processor.template_name == "janus-pro"
    tokens = torch.randint(0, 1024, (2, 17))
    positions = torch.arange(17).expand(2, -1)
    hidden = ours.backbone(ours.backbone.embed(tokens), positions=positions)
    # the same operations in the same order, but for fused attention: rounding alone
    torch.testing.assert_close(ours.backbone.logits(hidden), reference(tokens).logits, atol=1e-4, rtol=1e-4)
    pixels = torch.rand(2, 3, 32, 32)
    features = reference.model.get_image_features(pixels * 2 - 1).pooler_output
    torch.testing.assert_close(ours.understanding(pixels).flatten(), features.flatten(), atol=1e-4, rtol=1e-4)
    codes = torch.randint(0, 128, (2, 16))
    embedded = reference.prepare_embeddings_for_image_generation(codes)
    torch.testing.assert_close(ours.generation.embed(codes), embedded, atol=1e-5, rtol=1e-5)
    scores = reference.model.generation_head(hidden)
    torch.testing.assert_close(ours.generation.head(hidden, hidden[..., :0]), scores, atol=1e-5, rtol=1e-5)
    side = ours.generation.height
    painted = ours.generation.tokenizer.decode(codes, height=side, width=side)
    expected = reference.decode_image_tokens(codes)  # (N, H, W, 3)
    torch.testing.assert_close(painted, expected.permute(0, 3, 1, 2), atol=1e-4, rtol=1e-4)


def test_transformers_loads_what_we_write(
    reference: JanusForConditionalGeneration, folder: Path, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back", format_name="transformers")
    again, info = JanusForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    old, new = reference.state_dict(), again.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    tied = reference.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.language_model.embed_tokens.weight) == tied
    assert again.config.image_token_id == 6
    assert again.generation_config.generation_kwargs == {"boi_token_id": 4}
    first = open_lazily(folder).processor.to_dict()
    assert open_lazily(tmp_path / "back").processor.to_dict() == first


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("template", ["janus", "janus-pro"])
def test_their_processor_writes_our_prompts(template: str, tmp_path: Path) -> None:
    reference_of(CASES["tied, deep adaptors"]).save_pretrained(tmp_path / "a")
    add_processor(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", overrides=[f"processor.template={template}"])
    convert(tmp_path / "b", tmp_path / "c", format_name="transformers")
    processor = JanusProcessor.from_pretrained(tmp_path / "c")
    ours = open_lazily(tmp_path / "b").processor
    image = Image.open(REFERENCE / "astronaut.png").convert("RGB")
    turns = [("user", "What is in the image?"), ("assistant", "A woman."), ("user", " And behind her? ")]
    plain = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in turns]
    plain[0]["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template(plain, add_generation_prompt=True)
    read = processor(text=text, images=image)
    messages = [Message(role, [Text(said)]) for role, said in turns]
    messages[0].content.insert(0, ImageInput(image))
    prompt = ours.chat_prompt(messages)
    assert list(read["input_ids"][0]) == prompt.tokens.tolist()
    wish = [{"role": "user", "content": "a small dog"}]
    text = processor.apply_chat_template(wish, add_generation_prompt=True)
    drawn = processor(text=text, generation_mode="image")
    assert list(drawn["input_ids"][0]) == ours.draw_prompt("a small dog").tokens.tolist()


def test_a_head_of_its_own_beats_a_config_that_ties(tmp_path: Path) -> None:
    reference = reference_of(CASES["untied, grouped keys"])
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]  # the class' default is True
    (tmp_path / "config.json").write_text(json.dumps(config))
    add_processor(tmp_path)
    model = ModelAssembly.from_checkpoint(tmp_path).model
    assert torch.equal(model.backbone.model.lm_head.weight, reference.lm_head.weight)
    assert not torch.equal(
        model.backbone.model.lm_head.weight, model.backbone.model.model.embed_tokens.weight
    )


def test_settings_may_lie_within_the_processors_file(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    settings["image_mean"] = [0.25, 0.5, 0.75]
    settings["background_color"] = None
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    pixels = open_lazily(folder).processor.pixels
    assert pixels.mean == (0.25, 0.5, 0.75)
    assert pixels.fill == (63, 127, 191)
    assert pixels.height == 32


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("understanding.adaptor.name", "linear"),
        ("understanding.encoder.activation", "gelu_pytorch_tanh"),
        ("understanding.encoder.pixels.height", 64),
        ("generation.head.hidden", 7),
        ("generation.width", 64),
        ("generation.tokenizer.l2_norm", False),
    ],
)
def test_says_what_it_cannot_hold(path: str, value: object, tmp_path: Path) -> None:
    convert_source = reference_of(CASES["untied, grouped keys"])
    convert_source.save_pretrained(tmp_path / "theirs")
    add_processor(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "native")
    config = json.loads((tmp_path / "native/config.json").read_text())["model"]
    *keys, last = path.split(".")
    at = config
    for key in keys:
        at = at[key]
    at[last] = value
    with pytest.raises(CheckpointError, match="the transformers format supports only "):
        write_config(config, tmp_path)


@pytest.mark.parametrize(
    ("width", "intermediate"), [(1024, 4096), (1152, 4304), (48, 179), (7, 22), (1000, 1)]
)
def test_the_ratio_gives_the_width_back(width: int, intermediate: int) -> None:
    assert int(width * _ratio(width, intermediate)) == intermediate


class TestTransformersFormatKeepsTheContract(CheckpointFormatContract):
    @pytest.fixture(autouse=True)
    def _of_a_folder(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> tuple[TransformersFormat, CheckpointFormatExample]:
        config = json.loads((self.folder / "config.json").read_text())
        weights = load_file(self.folder / "model.safetensors")
        return TransformersFormat(TransformersConfig()), CheckpointFormatExample(config, weights)
