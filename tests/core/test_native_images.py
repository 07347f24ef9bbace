"""Images of several sizes in one batch and in one conversation: each is read as it is alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLModel, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    convert_image_to_patches,
)

from janus_modular import ConfigError, ImageInput, ImageTarget, Message, PixelSpec, Sample, Sequence, Text
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import MixedImages, collate
from janus_modular.model.build import build_model
from janus_modular.positions import PositionRule
from janus_modular.processing.image_transforms import native_size, understanding_pixels
from janus_modular.sequence import occurrences
from janus_modular.serving import AnswerRequest, Engine
from janus_modular.training.bad_samples import cut
from janus_plugins.understanding_encoders.hf_vision import HfVisionConfig, HfVisionEncoder

NATIVE = "understanding.encoder.pixels={height: 32, width: 32, resize: native, multiple: 8}"
NOISE = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
WIDE, TALL, SQUARE = (Image.fromarray(NOISE[:h, :w]) for h, w in ((20, 60), (70, 25), (33, 33)))
POSITIONS = {"wide": 2 * 6, "tall": 6 * 2, "square": 4 * 4}


def model_config(*overrides: str) -> ModelConfig:
    return resolve(load("model/tiny", [NATIVE, *overrides]), ModelConfig)


@pytest.fixture(scope="module")
def janus() -> Janus:
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(model_config())
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)  # choices are clear
    return Janus.of(assembly)


def conversation(*images: Image.Image, supervised: bool = True) -> Sample:
    question = Message("user", [Text("what?"), *(ImageInput(image) for image in images)])
    return Sample([question, Message("assistant", [Text("that", supervised=supervised)])])


def sequences(janus: Janus) -> list[Sequence]:
    samples = [conversation(WIDE), conversation(SQUARE, TALL, WIDE), conversation(TALL)]
    return [janus.processor.sequence(sample) for sample in samples]


def test_an_image_takes_as_many_positions_as_squares(janus: Janus) -> None:
    assert [sequence.input_counts for sequence in sequences(janus)] == [[12], [16, 12, 12], [12]]
    assert [int(sequence.understanding_mask.sum()) for sequence in sequences(janus)] == [12, 40, 12]
    shapes = [image.shape for image in sequences(janus)[1].understanding_pixels]
    assert shapes == [(3, 32, 32), (3, 48, 16), (3, 16, 48)]


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_states_of_a_mixed_batch_are_those_of_each_sequence_alone(janus: Janus, packed: bool) -> None:
    mixed = sequences(janus)
    batch = collate([mixed] if packed else mixed)
    assert isinstance(batch.understanding_pixels, MixedImages)
    with torch.no_grad():
        together = janus.model(batch).hidden.flatten(0, 1)
        start = 0
        for row, sequence in enumerate(mixed):
            first = start if packed else row * batch.tokens.shape[1]
            alone = janus.model(collate([sequence])).hidden[0]
            # 3e-5: float32 sums of another order, on values of about 1
            torch.testing.assert_close(together[first : first + len(sequence)], alone, rtol=0, atol=3e-5)
            start += len(sequence)


def test_features_are_siglip2s_at_three_sizes_in_one_batch(janus: Janus) -> None:
    """transformers pads three images to one length, and masks the padding."""
    torch.manual_seed(1)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {**config, "patch_size": 8, "num_patches": 16, "vision_use_head": False}
    reference = Siglip2VisionModel(Siglip2VisionConfig(**keys)).eval()
    torch.nn.init.normal_(reference.embeddings.position_embedding.weight)
    spec = {"height": 32, "width": 32, "resize": "native", "multiple": 8}
    encoder = HfVisionEncoder(
        HfVisionConfig(config={"model_type": "siglip2_vision_model", **keys}, pixels=PixelSpec(**spec))
    ).eval()
    encoder.model.load_state_dict(reference.state_dict())
    images = [understanding_pixels(image, encoder.pixels) for image in (WIDE, SQUARE, TALL)]
    padded, shapes = torch.zeros(3, 16, 8 * 8 * 3), [(2, 6), (4, 4), (6, 2)]
    mask = torch.zeros(3, 16, dtype=torch.long)
    for i, image in enumerate(images):
        patches = convert_image_to_patches(image / 127.5 - 1, 8)
        padded[i, : len(patches)] = torch.from_numpy(patches)
        mask[i, : len(patches)] = 1
    with torch.no_grad():
        expected = reference(
            pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=torch.tensor(shapes)
        ).last_hidden_state
        for i, image in enumerate(images):
            features = encoder(torch.from_numpy(image)[None] / 127.5 - 1)[0]
            # 1e-5: float32, of layer norms' outputs of about 1
            torch.testing.assert_close(features, expected[i, : len(features)], rtol=0, atol=1e-5)


def test_a_folder_of_naflex_is_read_as_its_processor_does(tmp_path: Path) -> None:
    keys = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Siglip2VisionModel(
        Siglip2VisionConfig(**keys, patch_size=8, num_patches=16, vision_use_head=False)
    )
    model.save_pretrained(tmp_path)
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24)
    processor.save_pretrained(tmp_path)
    encoder = HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path)))
    spec = encoder.pixels
    assert (spec.resize, spec.multiple, spec.height * spec.width) == ("native", 8, 24 * 64)
    shapes = processor(images=[WIDE, TALL, SQUARE], return_tensors="np")["spatial_shapes"].tolist()
    sizes = [native_size(image.height, image.width, spec) for image in (WIDE, TALL, SQUARE)]
    assert [[height // 8, width // 8] for height, width in sizes] == shapes


def test_answers_of_an_engine_are_those_alone_with_a_prefix_cache(janus: Janus) -> None:
    """Beginnings that are shared end in the middle of an image of another size."""
    asked = [[WIDE], [WIDE, SQUARE], [WIDE, TALL], [SQUARE, TALL], [WIDE, SQUARE, TALL]]
    expected = [janus.chat("what?", images, max_tokens=6) for images in asked]
    with Engine(janus, rows=2) as engine:
        for images, answer in [*zip(asked, expected, strict=True)] * 2:
            message = Message("user", [*map(ImageInput, images), Text("what?")])
            assert engine.submit(AnswerRequest([message], max_new_tokens=6)).result(60) == answer
        assert engine.stats().reused_positions > 0


@pytest.mark.parametrize("text", ["a12b", "1a2", "ab2c1"])
def test_position_ids_of_images_of_several_grids_are_those_of_transformers(text: str) -> None:
    """A letter is a text token, a digit an image of a grid; between images, there is a token."""
    text = text.replace("12", "1-2")
    grids = [{"1": (2, 3), "2": (4, 1)}[letter] for letter in text if letter.isdigit()]
    counts = [rows * columns for rows, columns in grids]
    numbers = iter(counts)
    is_image = np.concatenate(
        [np.full(next(numbers), True) if letter.isdigit() else [False] for letter in text]
    )
    tokens = np.arange(len(is_image))
    sequence = Sequence(tokens, np.full_like(tokens, -100), is_image, np.zeros_like(is_image))
    with torch.device("meta"):
        index_of = Qwen2VLModel(Qwen2VLConfig(vision_config={"spatial_merge_size": 1})).get_rope_index
    expected, _ = index_of(
        torch.from_numpy(tokens)[None],
        torch.from_numpy(is_image.astype(np.int32))[None],
        torch.tensor([[1, *grid] for grid in grids]),
    )
    ids = PositionRule(["temporal", "height", "width"], (4, 4)).ids(sequence, grids)
    assert np.array_equal(ids, expected[:, 0].numpy())


@pytest.mark.parametrize("option", ["resize: native, multiple: 8", "resize: tiles, max_tiles: 4"])
def test_encoders_of_one_size_refuse_images_of_several(option: str) -> None:
    vit = "name: vit, feature_dim: 32, layers: 1, heads: 2, stem: [8, 16, 32]"
    pixels = f"pixels: {{height: 32, width: 32, {option}}}"
    joined = f"{{name: joined, encoders: [{{{vit}, {pixels}}}, {{{vit}, {pixels}}}]}}"
    config = resolve(load("model/tiny", [f"understanding.encoder={joined}"]), ModelConfig)
    with pytest.raises(ConfigError, match=r"joined: found an encoder with pixels\.resize (native|tiles)"):
        build_model(config, on_meta=True)


def test_images_of_equal_bytes_and_another_shape_are_other_prompts(janus: Janus) -> None:
    wide, tall = Image.new("RGB", (60, 20)), Image.new("RGB", (20, 60))
    prompts = [janus.processor.sequence(conversation(image)) for image in (wide, tall, wide)]
    assert prompts[0].tokens.tolist() == prompts[1].tokens.tolist()
    assert occurrences(prompts) == [0, 0, 1]


def test_a_saved_model_reads_images_in_the_same_sizes(janus: Janus, tmp_path: Path) -> None:
    janus.save_pretrained(tmp_path / "model")
    again = Janus.from_pretrained(tmp_path / "model", device="cpu")
    assert again.processor.to_dict() == janus.processor.to_dict()
    assert again.chat("what?", [TALL, WIDE], max_tokens=6) == janus.chat("what?", [TALL, WIDE], max_tokens=6)


def test_a_dropped_condition_keeps_the_images_behind_it(janus: Janus) -> None:
    drawn = ImageTarget(SQUARE)
    sample = Sample(
        [
            Message("user", [ImageInput(WIDE), ImageInput(SQUARE), Text("draw")]),
            Message("assistant", [drawn]),
            Message("user", [ImageInput(TALL), Text("what?")]),
            Message("assistant", [Text("that", supervised=True)]),
        ]
    )
    dropped = janus.processor.sequence(sample, condition_dropout=True)
    assert dropped.input_counts == [12]
    assert [image.shape for image in dropped.understanding_pixels] == [(3, 48, 16)]
    assert int(dropped.understanding_mask.sum()) == 12


def test_a_cut_sequence_keeps_whole_images(janus: Janus) -> None:
    sequence = sequences(janus)[1]
    second = int(np.flatnonzero(np.diff(sequence.understanding_mask.astype(int)) == 1)[1]) + 5
    shorter = cut(sequence, second)
    assert shorter.input_counts == [16]
    assert len(shorter.understanding_pixels) == 1
    assert int(shorter.understanding_mask.sum()) == 16


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (
            ["understanding.encoder.pixels.multiple=16"],
            "expected the side of a position in pixels: an image",
        ),
        (
            ["understanding.adaptor={name: pixel-unshuffle, factor: 2}"],
            r"an image of 8x8 pixels, which pixels.resize=native may make: .*Choose another pixels.multiple",
        ),
        (["understanding.encoder.pixels.multiple=4"], "an image of 4x4 pixels"),
    ],
)
def test_squares_that_are_no_positions_are_errors(overrides: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        build_model(model_config(*overrides), on_meta=True)


def test_adaptors_that_merge_patches_have_larger_squares() -> None:
    overrides = ["understanding.adaptor={name: pixel-unshuffle, factor: 2}"]
    model = build_model(model_config("understanding.encoder.pixels.multiple=16", *overrides))
    assert (model.understanding.num_tokens, model.understanding.tokens_follow_size) == (4, True)
    assert model.understanding(torch.zeros(1, 3, 16, 48, dtype=torch.uint8)).shape == (1, 3, 64)


def test_a_resampler_makes_the_same_positions_of_every_size() -> None:
    torch.manual_seed(0)
    config = model_config("understanding.adaptor={name: perceiver, queries: 5}")
    janus = Janus.of(ModelAssembly.from_config(config))
    assert not janus.model.understanding.tokens_follow_size
    sequence = janus.processor.sequence(conversation(WIDE, TALL))
    assert sequence.input_counts == [5, 5]
    assert janus.model(collate([sequence])).hidden.isfinite().all()
