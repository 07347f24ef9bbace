"""Encodes and decodes images with the image tokenizer of a model in torch, and measures what is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from janus_modular.capabilities import EncodesImages
from janus_modular.errors import EvaluationError
from janus_modular.evaluation.results import Results, batched
from janus_modular.evaluation.schema import EvalConfig
from janus_modular.janus import Janus
from janus_modular.processing.image_io import open_image
from janus_modular.processing.image_transforms import generation_pixels

if TYPE_CHECKING:
    from torch import Tensor

PEAK = 255
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5
"""Of the Gaussian window, 11 x 11, as in the paper on SSIM (Wang et al., 2004)."""


@runtime_checkable
class DecodesImages(EncodesImages, Protocol):
    """A generation path that decodes its targets to images."""

    def decode_image(self, codes: Tensor) -> Tensor:
        """Decode targets into images (N, 3, height, width), uint8."""
        ...


def psnr(image: NDArray[np.uint8], other_image: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB of two images (3, H, W); infinite if they are equal."""
    error = np.mean((image.astype(np.float64) - other_image) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim(image: NDArray[np.uint8], other_image: NDArray[np.uint8]) -> float:
    """Return the structural similarity of two images (3, H, W): the mean over channels and whole windows."""
    x, y = image.astype(np.float64), other_image.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def reconstruct_images(
    janus: Janus, files: Sequence[Path], config: EvalConfig, on_progress: Callable[[int, int], None]
) -> Results:
    """Return PSNR and SSIM, means over images, and the share of codes that they use.

    Images are scaled and cropped to the size that the model draws, as in training.

    Raises:
        EvaluationError: the model's generation path has no codes, or its images are too small.
        ConfigError: the model runs from a bundle.
    """
    import torch

    path = janus.model.generation
    if not isinstance(path, DecodesImages) or not path.encoded.ids:
        raise EvaluationError(
            f"the model's generation path {type(path).__name__} has no codes: reconstruction needs an image"
            " tokenizer. Evaluate a model whose path has one, such as autoregressive."
        )
    if min(path.height, path.width) <= 2 * SSIM_RADIUS:
        raise EvaluationError(
            f"the model draws {path.width} x {path.height} pixels; SSIM needs {2 * SSIM_RADIUS + 1} at least."
        )
    device = next(janus.model.parameters()).device
    used: list[set[int]] = [set() for _ in path.encoded.ids]
    ratios, similarities = list[float](), list[float]()
    for batch in batched(files, config.batch_size):
        on_progress(len(ratios), len(files))
        pixels = np.stack(
            [generation_pixels(open_image(file), height=path.height, width=path.width) for file in batch]
        )
        with torch.no_grad():
            rngs = [np.random.default_rng(0) for _ in batch]
            codes = path.targets(torch.from_numpy(pixels).to(device), rngs)
            decoded = path.decode_image(codes).cpu().numpy()
        ids = codes.cpu().numpy().reshape(-1, len(used))
        for codebook, column in zip(used, ids.T, strict=True):
            codebook.update(column.tolist())
        ratios += [psnr(*pair) for pair in zip(pixels, decoded, strict=True)]
        similarities += [ssim(*pair) for pair in zip(pixels, decoded, strict=True)]
    on_progress(len(files), len(files))
    metrics: dict[str, Any] = {
        "images": len(files),
        "psnr": float(np.mean(ratios)),
        "ssim": float(np.mean(similarities)),
        "codes_used": sum(map(len, used)),
        "code_usage": sum(map(len, used)) / sum(path.encoded.ids),
    }
    return Results({"all": metrics}, {})


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders.

    Raises:
        EvaluationError: there is no image, or another file, which a mean over the folder would leave out.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is no folder; expected a folder of images.")
    endings = Image.registered_extensions()
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    unknown = [file for file in files if file.suffix.lower() not in endings]
    if not files or unknown:
        example = f", {unknown[0]} for example" if unknown else ""
        raise EvaluationError(
            f"{folder} has {len(files)} files, and {len(unknown)} that are no images{example}; expected"
            " images alone (.png, .jpg, ...). Move the others elsewhere."
        )
    return files


def _windowed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Gaussian means of all windows that lie within an image (C, H, W)."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    kernel = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        values = sliding_window_view(values, len(kernel), axis=axis) @ kernel
    return values
