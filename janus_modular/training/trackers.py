"""The trackers of a run: opened before its first step, and named in the errors that they raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from janus_modular.config import to_plain
from janus_modular.errors import JanusError, TrainingError
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.protocols import LogsConfig, Tracker
from janus_modular.training.schema import TrainConfig


def open_trackers(config: TrainConfig, plugins: Plugins) -> list[Tracker]:
    """Build the trackers of a run, and pass its settings to those that record them.

    Raises:
        TrainingError: a tracker cannot start.
    """
    build, output = ModelBuilder(plugins), Path(config.output)
    try:
        trackers: list[Tracker] = [build(tracker, output) for tracker in config.trackers]
    except OSError as error:
        raise TrainingError(
            f"a tracker cannot start: {error}. Is {output} a folder that can be written?"
        ) from error
    for tracker in trackers:
        if isinstance(tracker, LogsConfig):
            with tracker_errors(tracker, "the settings of the run"):
                tracker.log_config(to_plain(config))
    return trackers


@contextmanager
def tracker_errors(tracker: Tracker, subject: str) -> Iterator[None]:
    """Turn an error of a tracker, which may be of any class, into one that names the tracker.

    Raises:
        TrainingError: something inside failed; a JanusError is raised as it is.
    """
    try:
        yield
    except JanusError:
        raise
    except Exception as error:
        raise TrainingError(
            f"{type(tracker).__name__}: {subject} cannot be written: {error or type(error).__name__}. Fix"
            " that, or choose other trackers."
        ) from error
