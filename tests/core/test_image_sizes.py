"""Drawing in sizes other than the model's own: against a model of the same weights whose own size it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular import Janus, PromptError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.serving import DrawRequest, Engine
from janus_modular.serving.requests import Finished, PartialImage

HEIGHT, WIDTH = 48, 32
OWN_SIZE = [f"generation.height={HEIGHT}", f"generation.width={WIDTH}"]
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8))
SETTINGS = {"tiny": {"guidance": 3.0}, "tiny_flow": {"guidance": 2.0, "steps": 3}}


def random_janus(name: str, *overrides: str) -> Janus:
    torch.manual_seed(0)
    alone = ["generation.align_layer=null"] if name == "tiny_flow" else []  # no loss over features
    assembly = ModelAssembly.from_config(resolve(load(f"model/{name}", [*overrides, *alone]), ModelConfig))
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return Janus.of(assembly)


@pytest.fixture(scope="module", params=list(SETTINGS))
def pair(request: pytest.FixtureRequest) -> tuple[Janus, Janus, dict[str, float]]:
    """A model, one with its weights whose own size is another, and settings."""
    janus, other = random_janus(request.param), random_janus(request.param, *OWN_SIZE)
    other.model.load_state_dict(janus.model.state_dict())
    return janus, other, SETTINGS[request.param]


def test_another_size_is_that_of_a_model_whose_own_it_is(pair: tuple[Janus, Janus, dict[str, float]]) -> None:
    janus, other, settings = pair
    expected = other.draw("a bird", 2, seed=3, **settings)
    drawn = janus.draw("a bird", 2, seed=3, size=(HEIGHT, WIDTH), **settings)
    assert drawn[0].size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(np.stack(drawn.encoded), np.stack(expected.encoded))
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]
    assert drawn.usage == expected.usage
    [ours], [theirs] = janus.encode_images(PHOTO, size=(HEIGHT, WIDTH)), other.encode_images(PHOTO)
    np.testing.assert_array_equal(ours, theirs)
    # the model's own size is as before
    assert janus.draw("a bird", seed=3, **settings)[0].size == (32, 32)
    own = janus.processor.drawing
    assert own is not None
    same = janus.draw("a bird", seed=3, size=(own.height, own.width), **settings)
    assert same[0].tobytes() == janus.draw("a bird", seed=3, **settings)[0].tobytes()


def test_an_engine_draws_several_sizes_at_once(pair: tuple[Janus, Janus, dict[str, float]]) -> None:
    janus, _, settings = pair
    sizes = [(HEIGHT, WIDTH), None, (32, 64)]
    with Engine(janus, rows=6, max_seq_len=128) as engine:
        jobs = [engine.submit(DrawRequest("a bird", size=size, seed=1, settings=settings)) for size in sizes]
        results = [next(e.result for e in job if isinstance(e, Finished)) for job in jobs]
    for size, drawn in zip(sizes, results, strict=True):
        alone = janus.draw("a bird", seed=1, size=size, **settings)
        assert drawn[0].size == alone[0].size
        np.testing.assert_allclose(
            np.asarray(drawn[0], np.int64), np.asarray(alone[0], np.int64), atol=1
        )  # rows of a batch add in another order


def test_partial_images_have_the_size() -> None:
    janus = random_janus("tiny")
    with Engine(janus, rows=2, max_seq_len=128) as engine:
        job = engine.submit(DrawRequest("a bird", size=(HEIGHT, WIDTH), partial_images=2))
        partial = [event.image.size for event in job if isinstance(event, PartialImage)]
    assert partial == [(WIDTH, HEIGHT)] * 2


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((33, 32), "found 32x33; the model draws 32x32 and not this: .*33x32"),
        ((512, 512), "the context has 512"),
        ((0, 32), r"expected \(height, width\) in pixels, or one number"),
        ("32x48", r"expected \(height, width\)"),
        (True, r"expected \(height, width\)"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_reason(size: object, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        random_janus("tiny").draw("a bird", size=size)  # type: ignore[arg-type]


def test_the_command_takes_width_and_height(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    janus = random_janus("tiny")
    janus.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    PHOTO.save("photo.png")
    command = ["draw", "model", "a bird", "-n", "1", "--size", f"{WIDTH}x{HEIGHT}"]
    kept = ["--begin-with", "photo.png", "--keep", "0.25", "-o", "a.png"]
    result = CliRunner().invoke(app, [*command, *kept])
    assert result.exit_code == 0, result.output
    image = Image.open("a.png")
    assert image.size == (WIDTH, HEIGHT)
    prefix = janus.encode_images(PHOTO, size=(HEIGHT, WIDTH))[0][:6]
    [drawn] = janus.draw("a bird", size=(HEIGHT, WIDTH), prefix=prefix)
    assert image.tobytes() == drawn.tobytes()
    assert f"--size {WIDTH}x{HEIGHT}" in image.text["command"]
    refused = CliRunner().invoke(app, [*command[:-1], "48"])
    assert refused.exit_code
    assert "expected WIDTHxHEIGHT" in refused.output
