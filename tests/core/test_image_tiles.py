"""Images that are read in tiles: which tiles, their positions, and equal results everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from janus_modular import ImageInput, Message, PixelSpec, PromptError, Sample, Text
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.processing.image_transforms import encoder_inputs, tile_grid
from janus_modular.processing.prompt_check import check_context
from janus_modular.serving import AnswerRequest, Engine

TILES = "understanding.encoder.pixels={height: 32, width: 32, resize: tiles, max_tiles: 4}"
NOISE = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
WIDE, LARGE, SMALL = (Image.fromarray(NOISE[:h, :w]) for h, w in ((40, 90), (70, 70), (20, 20)))


@pytest.fixture(scope="module")
def janus() -> Janus:
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", [TILES]), ModelConfig))
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return Janus.of(assembly)


@pytest.mark.parametrize("most", [1, 2, 6, 12])
def test_grids_are_those_of_transformers(most: int) -> None:
    """Its InternVL takes the canvas of GOT-OCR2, of square tiles."""
    spec = PixelSpec(height=448, width=448, resize="tiles", max_tiles=most)
    sizes = np.random.default_rng(most).integers(20, 3000, (400, 2)).tolist()
    for height, width in [(448, 448), (448, 896), (896, 448), (900, 900), *sizes]:
        columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
        assert tile_grid(height, width, spec) == (rows, columns), (height, width)


def test_tiles_are_parts_of_the_scaled_image_and_the_whole_comes_last() -> None:
    spec = PixelSpec(height=32, width=32, resize="tiles", max_tiles=4)
    parts = encoder_inputs(WIDE, spec)
    assert [part.shape for part in parts] == [(3, 32, 32)] * 3
    canvas = np.asarray(WIDE.resize((64, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(np.concatenate(parts[:2], axis=2), canvas)
    whole = np.asarray(WIDE.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(parts[2], whole)
    assert len(encoder_inputs(SMALL, spec)) == 1
    assert len(encoder_inputs(LARGE, spec)) == 5


def test_an_image_takes_the_positions_of_its_tiles_between_one_begin_and_one_end(janus: Janus) -> None:
    question = Message("user", [ImageInput(WIDE), ImageInput(SMALL), Text("what?")])
    answer = Message("assistant", [Text("that", supervised=True)])
    sequence = janus.processor.sequence(Sample([question, answer]))
    assert sequence.input_counts == [16, 16, 16, 16]
    edges = np.flatnonzero(np.diff(sequence.understanding_mask.astype(int)))
    assert np.diff(edges)[::2].tolist() == [48, 16]
    features = janus.model.understanding(torch.from_numpy(np.stack(sequence.understanding_pixels)))
    embedded = janus.model.embed(collate([sequence]))[0]
    torch.testing.assert_close(embedded[sequence.understanding_mask], features.flatten(0, 1))


def test_an_engine_answers_as_the_model_does(janus: Janus) -> None:
    asked = [[WIDE], [WIDE, SMALL], [LARGE], [WIDE, LARGE]]
    with Engine(janus, rows=2) as engine:
        for images in asked * 2:
            message = Message("user", [*map(ImageInput, images), Text("what?")])
            expected = janus.chat("what?", images, max_tokens=6)
            assert engine.submit(AnswerRequest([message], max_new_tokens=6)).result(60) == expected


def test_a_saved_model_reads_the_same_tiles(janus: Janus, tmp_path: Path) -> None:
    janus.save_pretrained(tmp_path / "model")
    again = Janus.from_pretrained(tmp_path / "model", device="cpu")
    assert again.processor.to_dict() == janus.processor.to_dict()
    assert again.chat("what?", [LARGE], max_tokens=6) == janus.chat("what?", [LARGE], max_tokens=6)


def test_a_context_that_does_not_hold_an_image_with_all_tiles_is_an_error() -> None:
    words = [TILES, "backbone.config.max_position_embeddings=64", "processor.system=''"]
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", words), ModelConfig))
    with pytest.raises(PromptError, match=r"takes 82 positions; the context has 64\..* fewer positions"):
        check_context(assembly.processor)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"resize": "tiles"}, "max_tiles: found None; expected the most parts of an image"),
        ({"resize": "tiles", "max_tiles": 0}, "max_tiles: found 0"),
        ({"resize": "crop", "max_tiles": 4}, "max_tiles: found 4; it has no effect unless resize is tiles"),
        ({"resize": "tiles", "max_tiles": 4, "multiple": 8}, "multiple: found 8; it has no effect"),
    ],
)
def test_options_without_effect_are_errors(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PixelSpec(height=32, width=32, **options)  # type: ignore[arg-type]
