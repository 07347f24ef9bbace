"""MLflow: metrics, settings, drawings and answers, on a tracking server or in a database in the run's folder.

trackers: [{name: mlflow, uri: "http://localhost:5000", experiment: janus}]
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from janus_modular import ComponentConfig, Registry, Tracker, hookimpl
from janus_plugins.trackers.remote import flat_settings, require, store_id

BATCH = 100
"""Most parameters that MLflow takes at once."""


@dataclass
class MlflowConfig(ComponentConfig):
    """The place of the run."""

    uri: str | None = None  # null: the variable MLFLOW_TRACKING_URI, or mlflow.db in the run's folder
    experiment: str = "janus-modular"  # of the runs that are compared
    run: str | None = None  # name of the run; null: that of its folder

    def __post_init__(self) -> None:
        """Check that the library is installed."""
        require("mlflow")


class MlflowTracker:
    """Logs to a run of MLflow. A resumed run continues it; repeated steps are logged again.

    The service is first called at the start of the training, not when the tracker is built.
    """

    def __init__(self, config: MlflowConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder.absolute()
        self._client: Any = None
        self._run_id = ""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Start the run. Its parameters are the settings of its start; config.yaml has the newest."""
        client, is_new = self._opened()
        client.log_dict(self._run_id, dict(config), "config.yaml")
        if is_new:
            from mlflow.entities import Param

            params = [Param(_name(key), _cut(str(value))) for key, value in flat_settings(config).items()]
            for start in range(0, len(params), BATCH):
                client.log_batch(self._run_id, params=params[start : start + BATCH])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        client, _ = self._opened()
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        client.log_batch(
            self._run_id, metrics=[Metric(_name(name), value, now, step) for name, value in values.items()]
        )

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Log the images as ``image-0`` and so on: a prompt is too long for the name of a file."""
        client, _ = self._opened()
        for number, image in enumerate(images.values()):
            client.log_image(self._run_id, image, key=f"image-{number}", step=step)

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Log the texts as a file of the step."""
        client, _ = self._opened()
        page = "\n\n".join(f"{name}\n{text}" for name, text in texts.items())
        client.log_text(self._run_id, page, f"texts/step-{step:07}.txt")

    def close(self) -> None:
        """End the run; a resumption continues it."""
        if self._client is not None:
            self._client.set_terminated(self._run_id)

    def _opened(self) -> tuple[Any, bool]:
        """Return the client, and True if its run was new when it was opened."""
        if self._client is not None:
            return self._client, False
        for name in ("mlflow", "alembic"):  # they report the tables of a new database
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        uri = self._config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._folder.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=uri or f"sqlite:///{self._folder / 'mlflow.db'}")
        file = self._folder / "mlflow-run.txt"
        if is_new := not file.exists():
            experiment = client.get_experiment_by_name(self._config.experiment)
            artifacts = None if uri else (self._folder / "mlflow-artifacts").as_uri()
            experiment_id = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(self._config.experiment, artifact_location=artifacts)
            )
            run = client.create_run(experiment_id, run_name=self._config.run or self._folder.name)
            store_id(file, run.info.run_id)
        self._run_id = file.read_text("utf-8").strip()
        client.update_run(self._run_id, status="RUNNING")
        self._client = client
        return client, is_new


def _cut(value: str) -> str:
    """Return a parameter's value, or its beginning with a hint: MLflow takes 6,000 characters."""
    hint = " ... (whole in config.yaml)"
    return value if len(value) <= 6000 else value[: 6000 - len(hint)] + hint


def _name(name: str) -> str:
    """Return a name in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. /:]", "_", name)


@hookimpl
def register_trackers(registry: Registry[Tracker]) -> None:
    """Register ``mlflow``."""
    registry.add("mlflow", MlflowTracker, MlflowConfig)
