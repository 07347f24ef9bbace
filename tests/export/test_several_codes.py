"""A model with two codes per position: training, drawing, export, verification, runtimes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from janus_export.bench import bytes_read
from janus_export.bundle.bundle import load_bundle
from janus_export.runtimes.trt.cuda import Gpu
from janus_export.runtimes.trt.memory import DeviceTensor, TokenLog, join
from janus_export.tensorrt_build import build as building
from janus_export.tensorrt_build import targets
from janus_export.tensorrt_build.build import BuildConfig, build
from janus_export.verify import verify
from janus_modular import ImageTarget, Message, Sample, Text
from janus_modular.cli.app import app
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.training.trainable import set_trainable

pytestmark = (
    pytest.mark.slow
)  # a minute for the exports; `test_learning` and the contracts train and compare it

POSITIONS, CODEBOOKS = 8, (8, 16)


@pytest.fixture
def torches(several_codes_checkpoint: Path) -> Janus:
    return Janus.from_pretrained(several_codes_checkpoint)


def nearly_equal(ours: list[Image.Image], theirs: list[Image.Image]) -> bool:
    """Truncated to 8 bits, a last digit may fall either way."""
    pairs = zip(ours, theirs, strict=True)
    return all(np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1 for one, other in pairs)


def test_its_loss_is_of_both_codes_and_falls(torches: Janus):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8))
    told = [Message("user", [Text("Draw noise.")]), Message("assistant", [ImageTarget(image, True)])]
    batch = collate([torches.processor.sequence(Sample(told, source="noise"))])
    model = torches.model
    set_trainable(model, ["generation.embedding", "generation.adaptor", "generation.head", "backbone"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    history = []
    for _ in range(12):
        loss = model(batch).losses["image"].mean()
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[-1] < 0.5 * history[0]

    path = model.generation.eval()
    codes = path.targets(batch.generation_pixels)  # (1, 8, 2)
    assert codes.shape == (1, POSITIONS, 2)
    with torch.no_grad():
        hidden = torch.randn(1, POSITIONS, 64)
        first, second = (path.head(hidden, codes[..., :known]).flatten(0, 1) for known in (0, 1))
        expected = sum(
            F.cross_entropy(logits, codes[..., s].flatten(), reduction="none")
            for s, logits in enumerate((first, second))
        )
    torch.testing.assert_close(path.losses(hidden, codes)["image"].flatten(), expected)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_drawing_has_two_codes_a_position_independent_of_its_batch(
    torches: Janus, codes_of: Callable[..., Any], guidance: float
):
    together, images = codes_of(torches, seed=1, guidance=guidance)
    assert together.shape == (4, POSITIONS, 2)
    for s, size in enumerate(CODEBOOKS):
        assert together[..., s].min() >= 0
        assert together[..., s].max() < size
        assert len(np.unique(together[..., s])) > size // 2
    alone, others = codes_of(torches, seed=1, guidance=guidance, batch_size=1)
    np.testing.assert_array_equal(alone, together)
    assert nearly_equal(others, images)
    assert images[0].size == (16, 32)


@torch.no_grad()
def test_a_code_is_drawn_under_guidance_from_the_code_before_it(torches: Janus):
    """Greedily, by the formula: both rows of an image know its first code when the second is chosen."""
    path, hidden = torches.model.generation, torch.randn(6, 64)
    ones = torch.ones(3, sum(CODEBOOKS))
    codes, x = path.sample_image(hidden, ones, torch.tensor(3.0), torch.tensor(1.0))
    before = torch.empty(6, 0, dtype=torch.int64)
    for s in range(2):
        c, u = path.head(hidden, before).chunk(2)
        expected = (u + 3.0 * (c - u)).argmax(-1)
        assert torch.equal(codes[:, s], expected)
        before = expected.repeat(2)[:, None]
    vectors = path.embedding.weight[codes[:, 0]] + path.embedding.weight[CODEBOOKS[0] + codes[:, 1]]
    torch.testing.assert_close(x, path.adaptor(vectors[:, None], (1, 1))[:, 0].repeat(2, 1))


def test_its_bundle_is_proven_in_every_variant(
    several_codes_bundle: Path, several_codes_checkpoint: Path, tmp_path: Path
):
    folder = shutil.copytree(several_codes_bundle, tmp_path / "bundle")
    manifest = load_bundle(folder).manifest
    assert manifest["model"]["sizes"]["codebooks"] == [8, 16]
    assert manifest["graphs"]["decode_image"]["inputs"][0]["shape"] == ["images", POSITIONS, 2]
    reports = verify(folder, several_codes_checkpoint)
    failed = [
        f"{c.name}: {c.measured}"
        for one in reports
        for each in one.checks.values()
        for c in each
        if not c.passed
    ]
    assert failed == []
    exact, half = reports
    assert (exact.variant, half.variant) == ("fp32", "fp16")
    [drawn] = [check for check in exact.checks["drawing"] if "ids" in check.name]
    assert drawn.measured == f"0 of {2 * POSITIONS * 2} differ"  # two images, two codes a position


def test_its_bundle_is_proven_layer_by_layer(
    several_codes_bundle: Path, several_codes_checkpoint: Path, tmp_path: Path
):
    folder = shutil.copytree(several_codes_bundle, tmp_path / "bundle")
    reports = verify(folder, several_codes_checkpoint, variants=["fp32"], layers=True)
    failed = [
        f"{c.name}: {c.measured}"
        for one in reports
        for each in one.checks.values()
        for c in each
        if not c.passed
    ]
    assert failed == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_onnx_runtime_draws_torchs_codes(
    torches: Janus,
    several_codes_bundle: Path,
    codes_of: Callable[..., Any],
    guidance: float,
    temperature: float,
):
    settings = {"guidance": guidance, "temperature": temperature, "seed": 7}
    bundled = Janus.from_pretrained(several_codes_bundle, runtime={"name": "onnx", "threads": 1})
    expected, images = codes_of(torches, **settings)
    codes, ours = codes_of(bundled, **settings)
    np.testing.assert_array_equal(codes, expected)
    assert nearly_equal(ours, images)
    prefix = [[7, 0], [0, 15], [3, 3]]
    continued, _ = codes_of(bundled, **settings, prefix=prefix)
    np.testing.assert_array_equal(continued, codes_of(torches, **settings, prefix=prefix)[0])
    assert (continued[:, :3] == prefix).all()


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(("guidance", "ahead"), [(5.0, 1000), (5.0, 3), (1.0, 1000)])
def test_engines_on_a_gpu_draw_torchs_codes(
    torches: Janus,
    machine: Any,
    several_codes_bundle: Path,
    build_engines: Any,
    tmp_path: Path,
    codes_of: Callable[..., Any],
    target: str,
    guidance: float,
    ahead: int,
):
    folder = shutil.copytree(several_codes_bundle, tmp_path / "bundle")
    build_engines(folder, "fp32", target)
    janus = Janus.from_pretrained(folder, runtime={"name": target, "variant": "fp32", "sync_every": ahead})
    expected, images = codes_of(torches, guidance=guidance, seed=7)
    codes, ours = codes_of(janus, guidance=guidance, seed=7)
    np.testing.assert_array_equal(codes, expected)
    assert nearly_equal(ours, images)
    assert machine.counted("capture") > 0  # as one CUDA graph a step


@pytest.mark.parametrize("of_step", [(), (2,), (3,)])
def test_choices_of_successive_steps_are_joined_in_their_order(machine: Any, of_step: tuple[int, ...]):
    """Across two logs of four steps, each column where its row's others lie."""
    gpu = Gpu(0, extra="gpu")
    token_log, rng = TokenLog(gpu, (3, *of_step), steps=4), np.random.default_rng(0)
    columns, chosen = [], []
    for _ in range(7):
        ids = rng.integers(0, 1000, (3, *of_step))
        made = DeviceTensor.zeros(gpu, ids.shape, "int64")
        made.write(ids)
        columns.append(token_log.next())
        columns[-1].copy_from(made)
        chosen.append(ids)
    for column, ids in zip(columns, chosen, strict=True):
        np.testing.assert_array_equal(column.read(), ids)
    for first, last in ((0, 4), (1, 3), (4, 7), (2, 6)):  # the last one has columns of both logs
        joined = join(columns[first:last]).read()
        np.testing.assert_array_equal(joined, np.stack(chosen[first:last], axis=1))


def test_its_speed_is_measured_and_its_components_are_printed(
    several_codes_checkpoint: Path, several_codes_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bytes_read, "MEASURED_BYTES", 1 << 22)
    threads = torch.get_num_threads()
    for model in (several_codes_checkpoint, several_codes_bundle):
        words = ["bench", str(model), "--tokens", "3", "--rounds", "1", "--threads", "1", "--json"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout)
        assert facts["drawing"]["positions"] == POSITIONS
    torch.set_num_threads(threads)
    told = CliRunner().invoke(app, ["info", str(several_codes_checkpoint)])
    assert told.exit_code == 0, told.output
    assert "generation.head        factorized" in told.output
    shown = CliRunner().invoke(app, ["inspect", str(several_codes_bundle)])
    assert "codes (images, 2); x (rows, 64)" in shown.output


@pytest.mark.parametrize("variant", ["fp16", "fp32"])
def test_its_drawing_becomes_engines(
    several_codes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
):
    """Really built by TensorRT-RTX, which needs no GPU for that; the head's attention is causal."""
    for module in (targets, building):
        monkeypatch.setattr(module, "compute_capability", lambda: None)
    folder = shutil.copytree(several_codes_bundle, tmp_path / "bundle")
    graphs = ["sample_image", "embed_codes", "decode_image", "tokenize_image"]
    _, done = build(folder, BuildConfig("tensorrt-rtx", variant, ["8.9"], capacity=64, graphs=graphs))
    assert done == graphs
