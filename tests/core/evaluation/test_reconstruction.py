"""PSNR and SSIM by hand and by scikit-image, and the codes that a folder of images uses."""

from __future__ import annotations

from math import inf, log10
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from janus_modular import Janus
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import EvaluationError
from janus_modular.evaluation.reconstruction import psnr, ssim
from janus_modular.evaluation.run import read_data, run_evaluation
from janus_modular.evaluation.schema import EvalConfig
from janus_modular.processing.image_transforms import generation_pixels

C, Y, X = np.mgrid[:3, :24, :30]
SMOOTH = (20 * C + 4 * Y + 3 * X).astype(np.uint8)
NOISY = (SMOOTH + (7 * X * Y + 13 * X + 5 * C) % 41).astype(np.uint8)
NOISE = ((7 * X * Y + 13 * X + 5 * Y * Y + C) * 37 % 256).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "other_image", "expected_ssim", "expected_psnr"),
    [  # scikit-image 0.26: gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        (SMOOTH, NOISY, 0.5646563586357777, 21.065490652966727),
        (SMOOTH, NOISE, 0.02258885674078928, 9.84683416419244),
        (NOISY, SMOOTH[:, ::-1], 0.0706172750881182, 12.508910695961948),
    ],
)
def test_metrics_are_those_of_scikit_image(
    image: np.ndarray, other_image: np.ndarray, expected_ssim: float, expected_psnr: float
):
    # The order of sums differs: the relative difference was 1e-11 at most.
    assert ssim(image, other_image) == pytest.approx(expected_ssim, rel=1e-9)
    assert psnr(image, other_image) == pytest.approx(expected_psnr, rel=1e-9)


def test_metrics_by_hand():
    darker, lighter = (np.full((3, 12, 13), value, np.uint8) for value in (100, 110))
    assert psnr(darker, lighter) == pytest.approx(10 * log10(255**2 / 100))
    c1 = (0.01 * 255) ** 2
    assert ssim(darker, lighter) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1))
    assert psnr(NOISE, NOISE) == inf
    assert ssim(NOISE, NOISE) == pytest.approx(1)


def test_reconstruction_of_a_folder(tmp_path: Path, images: Path):
    torch.manual_seed(0)
    janus = Janus.of(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)))
    (images / "more").mkdir()
    Image.effect_noise((40, 40), 90).convert("RGB").save(images / "more/c.png")
    config = EvalConfig("reconstruction", str(images), batch_size=2)
    metrics = run_evaluation(janus, read_data(config), config, tmp_path / "out", {}).metrics["all"]
    files = ("a.png", "b.png", "more/c.png")
    pixels = np.stack([generation_pixels(Image.open(images / file), height=32, width=32) for file in files])
    path = janus.model.generation
    with torch.no_grad():
        codes = path.targets(torch.from_numpy(pixels), [])
        decoded = path.decode_image(codes).numpy()  # type: ignore[attr-defined]
    assert metrics["images"] == 3
    # Batches of other sizes round pixels to the neighbouring value now and then.
    assert metrics["psnr"] == pytest.approx(np.mean(list(map(psnr, pixels, decoded))), abs=0.01)
    assert metrics["ssim"] == pytest.approx(np.mean(list(map(ssim, pixels, decoded))), abs=0.001)
    assert metrics["codes_used"] == len(set(codes.flatten().tolist()))
    assert metrics["code_usage"] == metrics["codes_used"] / 64


def test_bad_folders(tmp_path: Path, images: Path):
    (images / "notes.txt").write_text("x")
    with pytest.raises(EvaluationError, match=r"3 files, and 1 that are no images, .*notes\.txt"):
        read_data(EvalConfig("reconstruction", str(images)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="has 0 files"):
        read_data(EvalConfig("reconstruction", str(tmp_path / "empty")))
    with pytest.raises(EvaluationError, match="there is no file or folder"):
        read_data(EvalConfig("reconstruction", str(tmp_path / "missing")))
