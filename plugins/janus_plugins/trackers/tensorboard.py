"""Metrics as curves: ``tensorboard --logdir RUN`` shows them during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorboard  # noqa: F401  # before torch: where both are missing, the error names the extra that has both
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from janus_modular import ComponentConfig, Registry, Tracker, hookimpl
from janus_plugins.trackers.run_files import check_run_file


@dataclass
class TensorboardConfig(ComponentConfig):
    """The folder of the curves."""

    folder: str = "tensorboard"  # in the run's folder

    def __post_init__(self) -> None:
        """Check that the run itself does not write the folder."""
        check_run_file("folder", self.folder)


class TensorboardTracker:
    """Writes event files. A resumed run hides earlier values of the same steps."""

    def __init__(self, config: TensorboardConfig, folder: Path) -> None:
        self._folder = folder / config.folder.strip()
        self._writer: SummaryWriter | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        writer = self._opened(step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Add an image to each series."""
        writer = self._opened(step)
        for name, image in images.items():
            writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Add a text to each series."""
        writer = self._opened(step)
        for name, text in texts.items():
            writer.add_text(name, text, step)

    def close(self) -> None:
        """Write what is still buffered."""
        if self._writer is not None:
            self._writer.close()

    def _opened(self, step: int) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        return self._writer


@hookimpl
def register_trackers(registry: Registry[Tracker]) -> None:
    """Register ``tensorboard``."""
    registry.add("tensorboard", TensorboardTracker, TensorboardConfig)
