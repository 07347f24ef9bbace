"""Processor time of a target image: decoded, scaled, encoded by Janus-Pro's tokenizer, and found among codes.

    python bench/stored_codes.py [--images 100000]

The tokenizer has Janus-Pro's shape and random weights, and computes in float32 on one thread. Processor
time is measured, not elapsed time, so that other load on the machine counts little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loading_workers import jpeg

from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import default_plugins
from janus_modular.processing.image_io import open_image
from janus_modular.processing.image_transforms import generation_pixels
from janus_modular.training.image_codes import ImageCodes, ImageCodesWriter, digest, folder_bytes

FILES = 4


def generation_path() -> Any:
    """Build Janus-Pro-1B's generation path with random weights."""
    raw = load("janus_pro_1b", ["generation.pretrained=null", "generation.tokenizer.pretrained=null"])
    spec = resolve(raw, ModelConfig).generation
    return ModelBuilder(default_plugins())(spec, 2048).eval()


def milliseconds(action: Callable[[], object], count: int) -> float:
    """Return the processor time of an action that is done for ``count`` images, for each of them."""
    began = time.process_time()
    action()
    return 1e3 * (time.process_time() - began) / count


def main() -> None:
    """Print the time of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="in the folder of codes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = [jpeg(seed) for seed in range(FILES)]
    opened = [open_image(file) for file in files]
    images = [generation_pixels(image, height=384, width=384) for image in opened]
    generation = generation_path()
    pixels = torch.from_numpy(images[0][None])
    codes = generation.targets(pixels)[0].numpy()  # the first call is not counted
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "codes")
        rng = np.random.default_rng(0)
        with ImageCodesWriter.opened(folder, generation.encoded, {}) as writer:
            for content in [*map(digest, images), *(rng.bytes(16) for _ in range(arguments.images))]:
                writer.add(content, codes)
        stored = ImageCodes(folder, generation.encoded, {})
        stored.find(images[0])
        times = {
            "decode": milliseconds(lambda: [*map(open_image, files)], FILES),
            "scale": milliseconds(
                lambda: [generation_pixels(image, height=384, width=384) for image in opened], FILES
            ),
            "encode": milliseconds(lambda: generation.targets(pixels), 1),
            "find": milliseconds(lambda: [stored.find(image) for image in images * 20], FILES * 20),
        }
        size = folder_bytes(folder) / len(stored)
    for name, value in times.items():
        print(f"{name:8} {value:10.2f} ms")
    print(f"{size:.0f} bytes an image on disk")


if __name__ == "__main__":
    main()
