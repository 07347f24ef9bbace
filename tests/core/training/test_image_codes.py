"""Stored codes of target images: training from them equals training from pixels; other codes are errors."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError, TrainingError
from janus_modular.plugins import default_plugins
from janus_modular.sequence import EncodedSpec, ImageTarget, Message, Sample, Text
from janus_modular.training import encode_images, image_codes
from janus_modular.training.data_check import check_data
from janus_modular.training.dry_run import dry_run
from janus_modular.training.encode_images import encode_data
from janus_modular.training.image_codes import INDEX, ImageCodes, ImageCodesWriter, digest
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train

from .conftest import Make, write_data

SPEC = EncodedSpec((4,), ids=(300,))
ORIGIN = {"tokenizer": {"sha256": "0"}, "transform": {"height": 2}}


def checkpoint(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = resolve(load("tiny", ["processor.system=''"]), ModelConfig)
    save(ModelAssembly.from_config(config), folder)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> dict[str, Any]:
    """The settings of a run that starts from a checkpoint, and has a folder for codes."""
    return {
        "model": "null",
        "init": str(checkpoint(tmp_path / "start")),
        "codes__path": str(tmp_path / "codes"),
        "condition_dropout": 0.5,
    }


class Noisy:
    """Five images, with noise over each."""

    def __len__(self) -> int:
        return 5

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        pixels = np.clip(50 * index + rng.integers(40, size=(32, 32, 3)), 0, 255).astype(np.uint8)
        target = Message("assistant", [ImageTarget(Image.fromarray(pixels))])
        return Sample([Message("user", [Text(f"image {index}")]), target])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def check_equal_training(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Train from pixels and from codes; the second run's tokenizer must not encode."""
    from janus_plugins.generation.autoregressive import AutoregressiveGeneration

    changes["codes__path"], folder = "null", changes["codes__path"]
    sources = changes.pop("own_sources", None)
    pixels = train(make(**changes, output=str(tmp_path / "pixels")), quiet=True, sources=sources)
    changes["codes__path"] = folder
    encode_data(make(**changes), default_plugins(), sources=sources)

    def targets(path: Any, pixels: torch.Tensor, rngs: Any = ()) -> torch.Tensor:
        raise AssertionError("an image is encoded")

    monkeypatch.setattr(AutoregressiveGeneration, "targets", targets)
    codes = train(make(**changes, output=str(tmp_path / "codes-run")), quiet=True, sources=sources)
    expected, actual = weights(pixels), weights(codes)
    assert {*expected} == {*actual}
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_training_from_codes_equals_training_from_pixels(
    make: Make, start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_equal_training(make, tmp_path, monkeypatch, **start)


def test_so_does_training_with_variants_of_augmented_images(
    make: Make, start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions of each image in six epochs; the first, third and fifth have equal images."""
    own = {"draw": Noisy()}
    changes = start | {"mixture": {"draw": 1, "read": 0, "text": 0}, "codes__variants": 2}
    with pytest.raises(ConfigError, match=r"images of source 'draw' differ between epochs.*codes.variants=N"):
        encode_data(make(**changes | {"codes__variants": "null"}), default_plugins(), sources=own)
    check_equal_training(make, tmp_path, monkeypatch, **changes, own_sources=own)
    assert encode_data(make(**changes), default_plugins(), sources=own).images == 10


def test_encoding_goes_on_and_adds_what_is_new(
    make: Make, start: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images of four are written when the first call dies; images of equal pixels are stored once."""
    config, plugins = make(**start), default_plugins()
    real, calls = encode_images._encode, []

    def interrupted(generation: Any, images: Any, writer: Any, device: Any) -> None:
        if images and sum(calls):
            raise KeyboardInterrupt
        calls.append(len(images))
        real(generation, images, writer, device)

    with monkeypatch.context() as patch:
        patch.setattr(encode_images, "_encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode_data(config, plugins, batch=2)
    with pytest.raises(TrainingError, match=r"is not complete: it has no index.npy. .*data encode CONFIG"):
        train(config, quiet=True)
    progress: list[tuple[str, int, int]] = []
    report = encode_data(config, plugins, batch=2, on_progress=lambda *state: progress.append(state))
    assert (report.images, report.encoded, report.codes) == (4, 2, [16])
    assert [state for state in progress if state[1] == state[2]] == [(n, 4, 4) for n in config.sources]

    Image.new("RGB", (64, 32), (1, 2, 3)).save(data / "red.png")
    shifted = data / "blue.png"
    shifted.write_bytes((data / "green.png").read_bytes())
    reports = check_data(config, plugins)
    assert [(r.not_encoded, r.ends_training) for r in reports.values()] == [
        (0, False),
        (1, True),
        (0, False),
    ]
    with pytest.raises(TrainingError, match=r"source 'draw': a target image is not in .*Were images added"):
        train(config, quiet=True)
    assert encode_data(config, plugins).encoded == 1
    assert not any(r.ends_training for r in check_data(config, plugins).values())


def test_codes_of_another_tokenizer_or_transform_are_refused(
    make: Make, start: dict[str, Any], tmp_path: Path
) -> None:
    """By training, the dry run, the check and a second encoding alike; random weights are never encoded."""
    from rich.console import Console

    plugins = default_plugins()
    encode_data(make(**start), plugins)
    other = make(**start | {"init": str(checkpoint(tmp_path / "other", seed=1))})
    for command in (
        lambda: train(other, quiet=True),
        lambda: dry_run(other, plugins, Console(quiet=True)),
        lambda: check_data(other, plugins),
        lambda: encode_data(other, plugins),
    ):
        with pytest.raises(
            TrainingError, match=r"of another image tokenizer[^$]*tokenizer.sha256: '\w+' there"
        ):
            command()
    folder, spec = tmp_path / "codes", EncodedSpec((16,), ids=(64,))
    recorded = json.loads((folder / "manifest.json").read_text())
    with pytest.raises(TrainingError, match=r"transform.height: 32 there, 48 here"):
        ImageCodes(folder, spec, recorded | {"transform": recorded["transform"] | {"height": 48}})
    with pytest.raises(ConfigError, match="random weights, whose codes mean nothing"):
        encode_data(make(codes__path=str(folder)), plugins)
    with pytest.raises(ConfigError, match=r"codes.path is not set"):
        encode_data(make(), plugins)


def test_a_run_from_codes_continues_the_run_from_pixels(make: Make, start: dict[str, Any]) -> None:
    """The weights' hash in a checkpoint of the run is that of the start: the tokenizer is frozen."""
    train(make(**start | {"codes__path": "null"}, schedule__steps=2), quiet=True)
    config = make(**start)
    encode_data(config, default_plugins())
    train(config, quiet=True, resume=True)


def images_of(count: int) -> list[np.ndarray]:
    return [np.full((3, 2, 2), i, np.uint8) for i in range(count)]


def written(folder: Path, count: int) -> list[np.ndarray]:
    images = images_of(count)
    with ImageCodesWriter.opened(folder, SPEC, ORIGIN) as writer:
        for i, image in enumerate(images):
            writer.add(digest(image), np.arange(i, i + 4))
    return images


def read(folder: Path, count: int) -> list[list[int]]:
    codes = ImageCodes(folder, SPEC, ORIGIN)
    return [codes.find(image).tolist() for image in images_of(count)]


def test_processes_read_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_codes, "SHARD_IMAGES", 3)
    written(tmp_path / "codes", 5)
    written(tmp_path / "codes", 8)  # adds three
    expected = [[i, i + 1, i + 2, i + 3] for i in range(8)]
    assert len(list((tmp_path / "codes").glob("shard-*.npy"))) == 3
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert [*pool.map(read, [tmp_path / "codes"] * 2, [8] * 2)] == [expected] * 2
    assert ImageCodes(tmp_path / "codes", SPEC, ORIGIN).find(np.zeros((3, 4, 1), np.uint8)) is None
    shard = np.load(tmp_path / "codes" / "shard-00000.npy", allow_pickle=False)  # plain NumPy reads it
    assert shard["codes"].dtype == np.uint16


def test_a_killed_writer_leaves_whole_shards(tmp_path: Path, monkeypatch: Any, killed_at: Any) -> None:
    """At every file operation; what a reader then opens is right, or says how to go on."""
    monkeypatch.setattr(image_codes, "SHARD_IMAGES", 2)
    for operation in range(1, 200):
        folder = tmp_path / f"codes-{operation}"
        if not killed_at(operation, lambda folder=folder: written(folder, 4)):
            break
        if (folder / INDEX).is_file():
            assert len(read(folder, 4)) == 4
        else:
            with pytest.raises(TrainingError, match=r"data encode"):
                read(folder, 4)
        written(folder, 4)
        assert len(read(folder, 4)) == 4
    assert operation > 10


@pytest.mark.parametrize("file", ["shard-00000.npy", INDEX])
def test_damaged_files_are_named(tmp_path: Path, file: str) -> None:
    written(tmp_path / "codes", 2)
    path = tmp_path / "codes" / file
    for content in (b"", path.read_bytes()[:-3], path.read_bytes().replace(b"<u", b">i"), os.urandom(200)):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=rf"{file}[^$]*data encode"):
            read(tmp_path / "codes", 2)


def test_the_command(tmp_path: Path, start: dict[str, Any]) -> None:
    data = write_data(tmp_path / "own")
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"init: {start['init']}\nlearn: [backbone]\nmixture: {{draw: 1}}\ndevice: cpu\nlength: 512\n"
        f"sources: {{draw: {{name: jsonl, path: {data / 'draw.jsonl'}, task: draw}}}}\n"
        f"codes: {{path: {tmp_path / 'codes'}}}\n"
    )
    result = CliRunner().invoke(app, ["data", "encode", str(config)])
    assert result.exit_code == 0, result.output
    assert "4 samples; their codes take at most 0.0 MB" in result.stderr
    assert "4 images, 4 of them new" in result.stdout
    report = json.loads(CliRunner().invoke(app, ["data", "encode", str(config), "--json"]).stdout)
    assert (report["images"], report["encoded"], report["samples"]) == (4, 0, {"draw": 4})
    for command in (["data", "check"], ["train", "--dry-run"]):
        assert CliRunner().invoke(app, [*command, str(config)]).exit_code == 0
    resolve(load(str(config)), TrainConfig)
