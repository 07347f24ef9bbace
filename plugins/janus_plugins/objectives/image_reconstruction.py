"""The objective `image-reconstruction`: trains an image tokenizer or autoencoder on images alone.

An image is encoded and decoded, and compared with itself. The component adds what regularises its encoded
images: a commitment and a codebook loss (VQ-VAE: van den Oord et al. 2017, equation 3), an entropy, or the
distance of a KL autoencoder from the normal distribution. These are its own
(`janus_modular.ReconstructsImages`); a component without that protocol trains by its own `losses`. A
perceptual and an adversarial loss may be added, as for VQGAN (Esser et al. 2021, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from janus_modular import (
    ComponentSpec,
    ImageTokenizer,
    JanusModel,
    Losses,
    Objective,
    OptimizerConfig,
    Processor,
    ReconstructsImages,
    Registry,
    Sample,
    component,
    hookimpl,
    image_of,
    sum_over_processes,
    target_pixels,
)
from janus_plugins.objectives.reconstruction_losses import (
    AdversarialConfig,
    PatchDiscriminator,
    frozen,
    perceptual_distance,
)
from janus_plugins.sizes import check_sizes


@dataclass
class ImageReconstructionConfig:
    """What is trained, and how images are compared."""

    module: str | None = None  # path in the model; null: the generation path's tokenizer or autoencoder
    distance: Literal["l1", "l2"] | None = None  # of pixels; null: the component's own
    pixel_weight: float = 1.0  # of that distance, beside the component's own losses
    perceptual: ComponentSpec | None = component(
        "understanding_encoders"
    )  # whose features are compared too: {name: hf-vision, pretrained: FOLDER}; null: none
    perceptual_weight: float = 1.0  # of their distance
    adversarial: AdversarialConfig | None = None  # a discriminator of patches; null: none

    def __post_init__(self) -> None:
        """Check the weights."""
        check_sizes(self, pixel_weight=0, perceptual_weight=0)
        if self.perceptual is not None and self.perceptual.config.pretrained is None:
            raise ValueError(
                f"perceptual: '{self.perceptual.name}' has random weights; expected `pretrained` ones, whose"
                " features mean something."
            )


class ImageReconstruction(nn.Module):
    """Reconstructs images, and reports ``psnr`` (dB), ``codes_used`` and ``perplexity`` of the codes.

    The latter are of the codes of a micro-batch, over all processes: the share of the codebook that occurs,
    and exp(H) of the frequencies, the number of codes that would be used as evenly (VQ-VAE).
    """

    def __init__(
        self, config: ImageReconstructionConfig, model: JanusModel, build: Callable[..., Any]
    ) -> None:
        super().__init__()
        self.config = config
        self.path = config.module or _only_component(model)
        self.trains: Sequence[str] = (self.path,)
        trained = _component(model, self.path)
        is_measured = isinstance(trained, ReconstructsImages)
        needs = (config.distance, config.perceptual, config.adversarial) != (None, None, None)
        if not is_measured and (needs or config.pixel_weight != 1):
            raise ValueError(
                "distance, pixel_weight, perceptual and adversarial need the images that"
                f" {self.path} makes; its class"
                f" {type(trained).__name__} has no `reconstruct` (`janus_modular.ReconstructsImages`), and"
                " trains by its own losses alone: leave them out"
            )
        # A list of its own: its weights stay as they are, and are not to be saved.
        self.perceptual = [frozen(build(config.perceptual))] if config.perceptual else []
        self.discriminator = None
        if config.adversarial:
            path = model.generation
            self.discriminator = PatchDiscriminator(config.adversarial, path.height, path.width)

    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        """Return the optimizer of the discriminator, if it has one of its own."""
        adversarial = self.config.adversarial
        own = None if adversarial is None else adversarial.optimizer
        return {} if own is None else {"discriminator": own}

    def example(
        self, sample: Sample, processor: Processor, rng: np.random.Generator
    ) -> Mapping[str, NDArray[Any]]:
        """Return the pixels (3, height, width) of an image of the sample, as those of an image target."""
        return {"pixels": target_pixels(image_of(sample, rng), processor)}

    def losses(self, model: JanusModel, batch: Mapping[str, Tensor], *, step: int) -> Losses:
        """Return the distance of pixels (n, 3, height, width), and the component's own losses."""
        module = _component(model, self.path)
        low, high = module.value_range
        pixels = low + batch["pixels"].float() / 255 * (high - low)
        if not isinstance(module, ReconstructsImages):
            return Losses(module.losses(pixels))
        result = module.reconstruct(pixels)
        distance = self.config.pixel_weight * result.pixel_loss(pixels, self.config.distance)
        metrics = {"psnr": psnr(result.pixels.detach(), pixels, low, high)}
        if result.codes is not None:
            metrics |= self._code_usage(result.codes, cast(ImageTokenizer, module).codebooks)
        terms = {"pixels": distance, **result.losses, **self._added(result.pixels, pixels, low, high, step)}
        return Losses(terms, metrics)

    def _added(
        self, reconstructed: Tensor, pixels: Tensor, low: float, high: float, step: int
    ) -> dict[str, Tensor]:
        """Return the perceptual and adversarial losses of a step."""
        terms = {}
        for encoder in self.perceptual:
            distance = perceptual_distance(encoder, reconstructed, pixels, low, high)
            terms["perceptual"] = self.config.perceptual_weight * distance
        adversarial = self.config.adversarial
        if self.discriminator is not None and adversarial is not None and step >= adversarial.start:
            real, decoded = (2 * (x - low) / (high - low) - 1 for x in (pixels, reconstructed.float()))
            terms["adversarial"] = adversarial.weight * self.discriminator.fooled(decoded)
            terms["discriminator"] = self.discriminator.hinge(real, decoded)
        return terms

    def _code_usage(self, codes: Tensor, codebooks: tuple[int, ...]) -> dict[str, tuple[Tensor, float]]:
        """Return the means over codebooks of the share of codes in use, and of their perplexity."""
        by_codebook = codes.flatten(0, 1).view(-1, len(codebooks)).unbind(-1)
        used, perplexity = [], []
        for of_codebook, size in zip(by_codebook, codebooks, strict=True):
            counts = torch.bincount(of_codebook, minlength=size)
            counts = sum_over_processes(counts) if self.training else counts
            frequencies = counts / counts.sum()
            used.append((counts > 0).float().mean())
            perplexity.append(torch.special.entr(frequencies).sum().exp())
        return {
            "codes_used": (torch.stack(used).mean(), 1.0),
            "perplexity": (torch.stack(perplexity).mean(), 1.0),
        }


def psnr(decoded: Tensor, pixels: Tensor, low: float, high: float) -> tuple[Tensor, float]:
    """Return the sum of the peak signal-to-noise ratios of images (n, 3, H, W) in dB, and their number."""
    squares = (decoded.clamp(low, high) - pixels).square().flatten(1).mean(1)
    return (10 * torch.log10((high - low) ** 2 / squares.clamp(min=1e-10))).sum(), float(len(pixels))


def _only_component(model: JanusModel) -> str:
    """Return the path of the frozen submodule of the generation path; there must be one."""
    names = model.generation.frozen_submodules
    if len(names) != 1:
        raise ValueError(
            f"module: null; the generation path has {len(names)} frozen submodules, expected one. Give the"
            " path of an image tokenizer or autoencoder in the model"
        )
    return f"generation.{names[0]}"


def _component(model: JanusModel, path: str) -> Any:
    """Return a component that can be trained on images; raise ValueError for any other."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"module: the model has none at '{path}'") from error
    if not hasattr(module, "value_range"):
        raise ValueError(
            f"module: {path} is a {type(module).__name__}; expected an image tokenizer or autoencoder"
        )
    return module


@hookimpl
def register_objectives(registry: Registry[Objective]) -> None:
    """Register ``image-reconstruction``."""
    registry.add("image-reconstruction", ImageReconstruction, ImageReconstructionConfig)
