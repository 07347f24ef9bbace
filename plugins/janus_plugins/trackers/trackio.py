"""Trackio: metrics, settings, drawings and answers, on this machine or in a Space of the Hugging Face hub.

trackers: [{name: trackio, project: janus}]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from janus_modular import ComponentConfig, Registry, Tracker, hookimpl
from janus_plugins.trackers.remote import flat_settings, require, stored_id


@dataclass
class TrackioConfig(ComponentConfig):
    """The place of the run: ``trackio show --project NAME`` shows it."""

    project: str = "janus-modular"  # of the runs that are compared
    space_id: str | None = (
        None  # a Space of the hub, as USER/NAME; null: the folder of the variable TRACKIO_DIR
    )

    def __post_init__(self) -> None:
        """Check that the library is installed."""
        require("trackio")


class TrackioTracker:
    """Logs to a run of trackio, named as the run's folder. A resumed run continues it.

    What trackio prints goes to stderr: the output of a command is not mixed with it.
    """

    def __init__(self, config: TrackioConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._settings: dict[str, Any] = {}
        self._run: Any = None

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Start the run with the settings of the training."""
        self._settings = flat_settings(config)
        self._opened()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self._log(step, values)

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Log the images as ``image-0`` and so on, with their names as captions."""
        import trackio

        captioned = {
            f"validation/image-{number}": trackio.Image(image, caption=name)
            for number, (name, image) in enumerate(images.items())
        }
        self._log(step, captioned)

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Log the texts as Markdown."""
        import trackio

        page = "\n\n".join(f"**{name}**\n\n{text}" for name, text in texts.items())
        self._log(step, {"validation/texts": trackio.Markdown(page)})

    def close(self) -> None:
        """Write what is still buffered."""
        if self._run is not None:
            with redirect_stdout(sys.stderr):
                self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        run = self._opened()
        with redirect_stdout(sys.stderr):
            run.log(dict(values), step=step)

    def _opened(self) -> Any:
        if self._run is None:
            import trackio

            name = stored_id(self._folder / "trackio-run.txt", self._folder)
            with redirect_stdout(sys.stderr):
                self._run = trackio.init(
                    project=self._config.project,
                    name=name,
                    space_id=self._config.space_id,
                    config=self._settings,
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        return self._run


@hookimpl
def register_trackers(registry: Registry[Tracker]) -> None:
    """Register ``trackio``."""
    registry.add("trackio", TrackioTracker, TrackioConfig)
