"""Weights & Biases: metrics, the config, drawings and answers; online, or in files for ``wandb sync``.

trackers: [{name: wandb, project: janus, mode: offline}]
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from janus_modular import ComponentConfig, Registry, Tracker, hookimpl
from janus_plugins.trackers.remote import require, stored_id


@dataclass
class WandbConfig(ComponentConfig):
    """The place of the run; the service's key comes from ``wandb login`` or the variable WANDB_API_KEY."""

    project: str = "janus-modular"  # of the runs that are compared
    entity: str | None = None  # user or team; null: the account's default
    run: str | None = None  # name of the run; null: that of its folder
    group: str | None = None  # of runs that belong together
    tags: list[str] = field(default_factory=list)  # to filter runs by
    mode: Literal["online", "offline"] | None = (
        None  # offline: files; null: the variable WANDB_MODE, or online
    )

    def __post_init__(self) -> None:
        """Check that the library is installed."""
        require("wandb")


class WandbTracker:
    """Logs to a run of wandb. A resumed run continues it; repeated steps are logged again.

    The service is first called at the start of the training, not when the tracker is built.
    """

    def __init__(self, config: WandbConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._settings: dict[str, Any] = {}
        self._run: Any = None

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Start the run with the settings of the training."""
        self._settings = dict(config)
        self._opened()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step; ``step`` is the axis of the charts."""
        self._opened().log({**values, "step": step})

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Log the images together, with their names as captions."""
        import wandb

        captioned = [wandb.Image(image, caption=name) for name, image in images.items()]
        self._opened().log({"validation/images": captioned, "step": step})

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Log the texts as a page."""
        import wandb

        page = "".join(f"<h4>{html.escape(k)}</h4><pre>{html.escape(v)}</pre>" for k, v in texts.items())
        self._opened().log({"validation/texts": wandb.Html(page), "step": step})

    def close(self) -> None:
        """Send what is still buffered."""
        if self._run is not None:
            self._run.finish()

    def _opened(self) -> Any:
        if self._run is None:
            import wandb

            run_id = stored_id(self._folder / "wandb-run.txt", self._folder)
            self._run = wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                name=self._config.run or self._folder.absolute().name,
                group=self._config.group,
                tags=self._config.tags,
                mode=self._config.mode,
                id=run_id,
                resume="allow",
                config=self._settings,
                dir=self._folder,
                settings=wandb.Settings(silent=True),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        return self._run


@hookimpl
def register_trackers(registry: Registry[Tracker]) -> None:
    """Register ``wandb``."""
    registry.add("wandb", WandbTracker, WandbConfig)
