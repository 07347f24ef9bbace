"""Compares sets of images (FID and KID, by torchmetrics), and images with their captions (CLIP score)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from janus_modular.errors import EvaluationError
from janus_modular.evaluation.caption_metrics import require_metrics
from janus_modular.evaluation.questions import Question
from janus_modular.evaluation.results import Results, batched
from janus_modular.evaluation.schema import EvalConfig
from janus_modular.foreign import foreign_errors
from janus_modular.interfaces import UnderstandingEncoder
from janus_modular.janus import Janus
from janus_modular.model.build import ModelBuilder
from janus_modular.model.device import choose_device
from janus_modular.model.understanding import normalized
from janus_modular.plugins import default_plugins
from janus_modular.processing.image_io import open_image
from janus_modular.processing.image_transforms import understanding_pixels
from janus_modular.weights.pretrained import resolve_pretrained

KID_SUBSET, KID_SUBSETS = 1000, 100
"""Images of a subset (all, if there are fewer), and subsets (Binkowski et al., "Demystifying MMD GANs")."""

OnProgress = Callable[[int, int], None]


class ImageFeatures(nn.Module):
    """The features (N, C) of an understanding encoder for images (N, 3, H, W): means over its positions."""

    def __init__(self, encoder: UnderstandingEncoder) -> None:
        super().__init__()
        self.encoder = cast(nn.Module, encoder)
        self.pixels = encoder.pixels
        self.num_features = encoder.feature_dim  # which torchmetrics reads

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of pixels (N, 3, H, W), uint8."""
        dtype = next(self.encoder.parameters()).dtype
        features: Tensor = self.encoder(normalized(pixels, self.pixels).to(dtype)).mean(1)
        return features.float()


@torch.no_grad()
def compare_image_sets(
    janus: Janus, real: Sequence[Path], drawn: Sequence[Path], config: EvalConfig, on_progress: OnProgress
) -> Results:
    """Return FID and KID between two sets of images, by the features of each encoder of the config.

    Without encoders, those of the model's understanding encoder (``model``) are compared. The numbers of
    different encoders, and those by Inception in papers, cannot be compared with each other.

    Raises:
        EvaluationError: a set has fewer than two images, or features are not finite.
        ImageError: an image cannot be read.
        MissingExtraError: torchmetrics is not installed.
    """
    require_metrics()
    if min(len(real), len(drawn)) < 2:
        raise EvaluationError(
            f"{config.path} has {len(real)} images and {config.images} {len(drawn)}; expected at least 2 in"
            " each."
        )
    device = next(janus.model.parameters()).device
    build = ModelBuilder(default_plugins())
    encoders: Mapping[str, Any] = {name: build(spec) for name, spec in config.encoders.items()}
    encoders = encoders or {"model": janus.model.understanding.encoder}
    metrics: dict[str, dict[str, float]] = {}
    total = len(encoders) * (len(real) + len(drawn))
    for number, (name, encoder) in enumerate(encoders.items()):
        features = ImageFeatures(encoder).eval().to(device)
        done = number * (len(real) + len(drawn))
        metrics[f"encoder {name}"] = _distances(
            features, (real, drawn), config.batch_size, partial(_advance, on_progress, done, total)
        )
    on_progress(total, total)
    return Results(metrics, {})


def _advance(on_progress: OnProgress, before: int, total: int, count: int) -> None:
    on_progress(before + count, total)


def _distances(
    features: ImageFeatures,
    sets: tuple[Sequence[Path], Sequence[Path]],
    batch_size: int,
    on_progress: Callable[[int], None],
) -> dict[str, float]:
    """Return the metrics of two sets of images."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    device = next(features.parameters()).device
    smallest = min(map(len, sets))
    identity = nn.Identity()
    identity.num_features = features.num_features  # type: ignore[assignment]
    fid = FrechetInceptionDistance(feature=identity).to(device)
    subset = min(KID_SUBSET, smallest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all features are kept: 8 kB an image or less
        kid = KernelInceptionDistance(feature=identity, subset_size=subset, subsets=KID_SUBSETS).to(device)
    done = 0
    for is_real, files in zip((True, False), sets, strict=True):
        for batch in batched(files, batch_size):
            on_progress(done)
            pixels = [understanding_pixels(open_image(file), features.pixels) for file in batch]
            groups = [[image] for image in pixels] if features.pixels.resize == "native" else [pixels]
            values = torch.cat([features(torch.from_numpy(np.stack(g)).to(device)) for g in groups])  # (N, C)
            if not values.isfinite().all():
                raise EvaluationError(
                    f"the features of {batch[0]} or of the {len(batch) - 1} images after it are not finite;"
                    " expected finite ones. Compute in another --dtype."
                )
            fid.update(values, real=is_real)
            kid.update(values, real=is_real)
            done += len(batch)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # of the subsets
        mean, deviation = kid.compute()
    return {
        "images": smallest,
        "features": features.num_features,
        "fid": float(fid.compute()),
        "kid": float(mean),
        "kid_deviation": float(deviation),
    }


def clip_score(questions: Sequence[Question], config: EvalConfig, on_progress: OnProgress) -> Results:
    """Return the mean CLIP score of images and their (first) captions: 100 times the cosine, 0 at least.

    The score of Hessel et al., "CLIPScore", 2021, without the factor 2.5.

    Raises:
        EvaluationError: the weights cannot be read.
        CheckpointError: there are no weights.
    """
    from transformers import AutoProcessor, CLIPModel

    folder = resolve_pretrained(str(config.clip))
    with foreign_errors(folder, EvaluationError, "Expected CLIP in transformers' form, with its processor."):
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model.to(choose_device("auto"))
    scores: list[float] = []
    for batch in batched(questions, config.batch_size):
        on_progress(len(scores), len(questions))
        inputs = processor(
            text=[question.answers[0] for question in batch],
            images=[open_image(question.images[0]) for question in batch],
            return_tensors="pt",
            padding=True,
            truncation=True,  # CLIP reads 77 tokens
        )
        with torch.no_grad():
            output = model(**inputs.to(model.device))
        cosines = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)  # (N,)
        scores += (100 * cosines).clamp(min=0).tolist()
    on_progress(len(scores), len(questions))
    return Results({"all": {"images": len(scores), "clip_score": float(np.mean(scores))}}, {})
