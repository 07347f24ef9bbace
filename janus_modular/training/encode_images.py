"""``data encode``: the target images of a run, encoded once by its image tokenizer, before training."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from janus_modular.capabilities import EncodesImages
from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.checkpoints.opening import LazyCheckpoint
from janus_modular.config import component_specs
from janus_modular.errors import ConfigError, TrainingError
from janus_modular.interfaces import GenerationPath
from janus_modular.model.build import ModelBuilder
from janus_modular.model.device import choose_device
from janus_modular.plugins import Plugins
from janus_modular.protocols import Source
from janus_modular.sequence import ImageTarget
from janus_modular.training.bad_samples import BadSample, BadSampleCounter, SampleError
from janus_modular.training.image_codes import ImageCodes, ImageCodesWriter, digest, folder_bytes, image_bytes
from janus_modular.training.initial_model import initial_model
from janus_modular.training.mixture import SampleRef
from janus_modular.training.objective import refuse_examples
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.sample_workers import SampleWorkers
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import BatchBuilder
from janus_modular.weights.loading import load_weights, move_buffers

log = logging.getLogger(__name__)

TRANSFORM = "scaled to cover, bicubic, cropped at the centre"
"""What `janus_modular.processing.image_transforms.generation_pixels` does."""

COMPARED_SAMPLES = 8
"""Samples of each source whose images are compared between two random generators."""

OnProgress = Callable[[str, int, int], None]
"""Gets a source, the number of its samples that are read, and the number that will be."""


@dataclass
class EncodingReport:
    """What `encode_data` has done."""

    folder: str
    images: int = 0  # in the folder
    encoded: int = 0  # by this call; the others were there before
    codes: list[int] = field(default_factory=list)  # shape of an image's codes
    bytes: int = 0  # of all files
    samples: dict[str, int] = field(default_factory=dict)  # read, by source: all of its random versions
    skipped: dict[str, int] = field(default_factory=dict)  # samples that cannot be used, by source


def open_codes(config: TrainConfig, generation: GenerationPath) -> ImageCodes | None:
    """Open the codes that a run takes in place of its target images; None if it encodes images itself.

    Raises:
        TrainingError: the codes are not complete, or of another tokenizer or transform.
        ConfigError: the generation path's targets cannot be stored.
    """
    if config.codes.path is None:
        return None
    path = storable(generation)
    return ImageCodes(Path(config.codes.path).expanduser(), path.encoded, codes_origin(path))


def storable(generation: GenerationPath) -> EncodesImages:
    """Return the path if its targets follow from frozen weights.

    Raises:
        ConfigError: its targets have no form in which they could be stored, or no frozen weights.
    """
    if not isinstance(generation, EncodesImages) or not generation.frozen_submodules:
        raise ConfigError(
            f"codes: the generation path {type(generation).__name__} has no frozen image tokenizer whose"
            " codes could be stored. Set codes.path=null."
        )
    return generation


def codes_origin(generation: EncodesImages) -> dict[str, Any]:
    """Return what stored codes depend on, for JSON: weights, transform, and the form of the codes."""
    weights = hashlib.sha256()
    module = cast(nn.Module, generation)
    for name in generation.frozen_submodules:
        for key, tensor in module.get_submodule(name).state_dict().items():
            weights.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "tokenizer": {"type": _tokenizer_types(generation), "sha256": weights.hexdigest()},
        "transform": {"height": generation.height, "width": generation.width, "resize": TRANSFORM},
        "codes": {"shape": list(generation.encoded.shape), "ids": _ids(generation)},
    }


def _tokenizer_types(generation: EncodesImages) -> str:
    modules = (cast(nn.Module, generation).get_submodule(name) for name in generation.frozen_submodules)
    return ", ".join(type(module).__name__ for module in modules)


def _ids(generation: EncodesImages) -> list[int] | None:
    return None if generation.encoded.ids is None else list(generation.encoded.ids)


def open_run_codes(config: TrainConfig, assembly: ModelAssembly, plugins: Plugins) -> ImageCodes | None:
    """Open the codes of a run whose model is on the meta device: the generation path's weights are read.

    Raises:
        JanusError: as `open_codes` and `frozen_generation` do.
    """
    return None if config.codes.path is None else open_codes(config, frozen_generation(assembly, plugins))


def frozen_generation(assembly: ModelAssembly, plugins: Plugins) -> GenerationPath:
    """Return the generation path of a model on the meta device with its weights, in float32 on the CPU.

    Raises:
        ConfigError: its frozen components have random weights.
        CheckpointError: weights do not fit.
    """
    path = assembly.model.generation
    if isinstance(assembly, LazyCheckpoint):
        generation = cast(nn.Module, deepcopy(path))
        prefix = "generation."
        tensors = ((name, tensor) for name, tensor in assembly.tensors.items() if name.startswith(prefix))
        own = ((name.removeprefix(prefix), tensor) for name, tensor in tensors)
        load_weights(generation, own, dtype=torch.float32).check(f"{assembly.folder}: generation")
        move_buffers(generation, device="cpu", dtype=torch.float32)
        return cast(GenerationPath, generation)
    spec = assembly.model.config.generation
    for name, component in component_specs(spec.config):
        if name in path.frozen_submodules and not (component.config.pretrained or spec.config.pretrained):
            raise ConfigError(
                f"{component.path or name}: has random weights, whose codes mean nothing; expected"
                " `pretrained` weights, or init=CHECKPOINT with a trained image tokenizer."
            )
    return cast(GenerationPath, ModelBuilder(plugins)(spec, assembly.model.backbone.hidden_size))


def encode_data(
    config: TrainConfig,
    plugins: Plugins,
    *,
    batch: int = 32,
    sources: Mapping[str, Source] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: OnProgress | None = None,
) -> EncodingReport:
    """Encode all target images of a run's sources into ``codes.path``; images that are there stay.

    Only the generation path's weights are read. An interrupted call is continued by the next. ``sources``
    replace the config's by name, as in `train`. ``on_start`` gets the number of samples, and the most bytes
    that their codes take with a target image each.

    Raises:
        TrainingError: the folder has codes of another tokenizer or transform, or another process writes it.
        ConfigError: there is no folder to write, the tokenizer has no weights, or a source's images are
            random and ``codes.variants`` is not set.
        DataError: a sample cannot be used, and the config does not skip it.
    """
    if config.codes.path is None:
        raise ConfigError("codes.path is not set; expected the folder to write: codes.path=FOLDER.")
    device = choose_device(config.device)
    assembly = initial_model(config, plugins, "meta")
    refuse_examples(config, assembly.model, plugins, "it reads images, not their codes")
    builder = batch_builder(
        config, open_sources(config, plugins, sources), assembly.model, assembly.processor
    )
    builder = replace(builder, condition_dropout=0.0)
    generation = storable(frozen_generation(assembly, plugins))
    cast(nn.Module, generation).eval().to(device)
    check_variants(builder, config)
    folder, origin = Path(config.codes.path).expanduser(), codes_origin(generation)
    report = EncodingReport(str(folder), codes=list(generation.encoded.shape))
    versions = config.codes.variants or 1
    totals = {name: len(source) * versions for name, source in builder.mixture.sources.items()}
    if on_start:
        on_start(sum(totals.values()), sum(totals.values()) * image_bytes(generation.encoded))
    counter = BadSampleCounter(config.bad_samples)
    with ImageCodesWriter.opened(folder, generation.encoded, origin) as writer:
        before = len(writer.locations)
        waiting: dict[bytes, np.ndarray] = {}
        for name, total in totals.items():
            refs = (SampleRef(name, number) for number in range(total))
            for done, images in enumerate(_images(builder, refs, config, counter), 1):
                for pixels in images:
                    content = digest(pixels)
                    if content not in writer:
                        waiting[content] = pixels
                if len(waiting) >= batch or done == total:
                    _encode(generation, waiting, writer, device)
                if on_progress:
                    on_progress(name, done, total)
        report.images, report.encoded = len(writer.locations), len(writer.locations) - before
    report.samples, report.skipped = totals, dict(counter.bad)
    report.bytes = folder_bytes(folder)
    return report


def check_variants(builder: BatchBuilder, config: TrainConfig) -> None:
    """Check that a source whose images are random has a number of random versions.

    Raises:
        ConfigError: names the source.
    """
    if config.codes.variants is not None:
        return
    for name, source in builder.mixture.sources.items():
        for index in range(min(COMPARED_SAMPLES, len(source))):
            try:
                versions = [_target_bytes(source, index, seed) for seed in (1, 2)]
            except Exception as error:  # bad samples are reported when all are read
                log.debug("source '%s', sample %d: %s", name, index, error)
                continue
            if versions[0] != versions[1]:
                raise ConfigError(
                    f"codes: the target images of source '{name}' differ between epochs (augmentation), so"
                    " that the codes of all epochs cannot be stored. Set codes.variants=N: N random versions"
                    " of each sample, one after the other; or switch the augmentation off."
                )


def _target_bytes(source: Source, index: int, seed: int) -> list[bytes]:
    sample = source.sample(index, np.random.default_rng(seed))
    return [
        segment.image.tobytes()
        for message in sample.messages
        for segment in message.content
        if isinstance(segment, ImageTarget) and segment.image is not None
    ]


def _images(
    builder: BatchBuilder, refs: Iterator[SampleRef], config: TrainConfig, counter: BadSampleCounter
) -> Iterator[list[np.ndarray]]:
    """Yield the pixels of each sample's target images, in order; workers read ahead."""
    with SampleWorkers(partial(_read, builder), config.workers, config.worker_type) as pool:
        for ref, result in pool.map(refs):
            is_bad = isinstance(result, BadSample)
            counter.add({} if is_bad else {ref.source: 1}, [result] if isinstance(result, BadSample) else [])
            yield [] if isinstance(result, BadSample) else result


def _read(builder: BatchBuilder, ref: SampleRef) -> tuple[SampleRef, list[np.ndarray] | BadSample]:
    """Return the pixels of a sample's target images, or why it is skipped."""
    try:
        sequences, _, _ = builder.try_sample(ref)
    except SampleError as error:
        return ref, builder.skipped(ref, error)
    images = (image for sequence in sequences for image in sequence.generation_images)
    return ref, [image for image in images if image.dtype == np.uint8]


@torch.no_grad()
def _encode(
    generation: EncodesImages,
    images: dict[bytes, np.ndarray],
    writer: ImageCodesWriter,
    device: torch.device,
) -> None:
    """Encode images, add their codes, and forget them.

    Raises:
        TrainingError: the generation path draws its targets at random.
    """
    if not images:
        return
    pixels = torch.from_numpy(np.stack(list(images.values()))).to(device)
    codes = generation.targets(pixels, [np.random.default_rng(0)] * len(images))
    if not len(writer.locations):
        again = generation.targets(pixels, [np.random.default_rng(1)] * len(images))
        if not torch.equal(codes, again):
            raise TrainingError(
                "the generation path's targets are random, so that they cannot be stored. Set"
                " codes.path=null."
            )
    for content, of_image in zip(images, codes.cpu().numpy(), strict=True):
        writer.add(content, generation.encoded.checked(of_image))
    images.clear()
