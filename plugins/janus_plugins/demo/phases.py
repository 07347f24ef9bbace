"""The training phases of the demo: the classifier, and then the stages, one after the other.

A phase whose result is in the folder is not run again, and an interrupted stage is resumed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from janus_modular.atomic_writes import write_text
from janus_modular.config import resolve, to_plain, to_yaml
from janus_modular.errors import ConfigError, TrainingError
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.training.loop import fit
from janus_modular.training.run_folder import newest_checkpoint
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train
from janus_modular.weights.files import open_weights
from janus_modular.weights.writing import write_weights
from janus_plugins.demo.labelled_images import LabelledImages, batches, to_pixels
from janus_plugins.demo.networks import Classifier
from janus_plugins.demo.schema import DemoConfig, PhaseConfig


@dataclass
class Demo:
    """A demo, its folder, and components that were trained elsewhere."""

    config: DemoConfig
    output: Path
    plugins: Plugins
    quiet: bool = False
    trained: dict[str, Path] = field(default_factory=dict)  # folders of weights, by the component's path

    def open(self, spec: ComponentSpec) -> LabelledImages:
        """Open a source of labelled images."""
        return cast(LabelledImages, ModelBuilder(self.plugins)(spec))

    def classifier(self) -> Classifier:
        """Return the trained classifier.

        Raises:
            ConfigError: the config has none.
        """
        if self.config.classifier is None:
            raise ConfigError("classifier: null; expected a phase, to evaluate drawings of classes.")
        source = self.open(self.config.images)
        torch.manual_seed(self.config.seed)
        classifier = Classifier(len(source.names))
        classifier(to_pixels(source.images[:2]))  # initialises the lazy last layer
        if not self._restore(classifier):
            self._fit(classifier, self.config.classifier, source)
        return classifier

    def stages(self) -> Path:
        """Train the stages; return the folder of the trained model."""
        start: dict[str, Any] = {"model": self.model_config()}
        for number, config in enumerate(self.stage_configs(start), 1):
            result = self._stage(config, f"stage {number} of {len(self.config.stages)}")
        model = self.output / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(result, model)
        return model

    def stage_configs(self, start: dict[str, Any]) -> Iterator[TrainConfig]:
        """Yield the training config of each stage; all but the first start from the previous stage."""
        plain = to_plain(self.config)
        shared = {key: plain[key] for key in ("sources", "trackers", "seed")} | plain["common"]
        for name, stage in plain["stages"].items():
            output = self.output / "phases" / name
            yield resolve({**shared, **stage, **start, "output": str(output)}, TrainConfig, self.plugins)
            start = {"init": str(output / "model")}

    def model_config(self) -> dict[str, Any]:
        """Return the model's config, with the weights of components that were trained elsewhere."""
        model = deepcopy(to_plain(self.config.model))
        for path, folder in self.trained.items():
            section = model
            for key in path.split("."):
                section = section[key]
            section["pretrained"] = str(folder)
        return cast(dict[str, Any], model)

    def _stage(self, config: TrainConfig, numbering: str) -> Path:
        output = Path(config.output)
        title = f"{numbering}, {output.name}"
        if (output / "model").is_dir():
            return output / "model"
        resume = newest_checkpoint(output) is not None
        if not resume:  # without a checkpoint, the stage starts again
            shutil.rmtree(output, ignore_errors=True)
        if self.config.processes > 1:
            return self._launch(config, resume)
        return train(config, resume=resume, quiet=self.quiet, title=title, plugins=self.plugins)

    def _launch(self, config: TrainConfig, resume: bool) -> Path:
        """Train a stage in several processes, with the command that users start; return its model.

        Raises:
            TrainingError: a process has ended with an error.
            KeyboardInterrupt: a signal came, and the processes have saved a checkpoint and ended.
        """
        output, count = Path(config.output), self.config.processes
        file = output.with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, to_yaml(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += ["-m", "janus_modular", "train", str(file)]
        command += ["--resume"] * resume + ["--quiet"] * self.quiet
        threads = str(max(1, torch.get_num_threads() // count))
        files = dict.fromkeys(str(info.file) for info in self.plugins.entry_points if info.file)
        own = {"OMP_NUM_THREADS": threads, "JANUS_PLUGIN_FILES": os.pathsep.join(files)}
        # In a session of its own: Ctrl-C in a terminal would reach the processes twice, and end them at once.
        process = subprocess.Popen(command, env=os.environ | own, start_new_session=True)
        with _forwarding(process) as received:
            status = process.wait()
        if received:
            raise KeyboardInterrupt
        if status:
            raise TrainingError(
                f"{output.name}: a process of {count} has ended with an error, and its message is above. The"
                " same command continues the demo."
            )
        return output / "model"

    def _restore(self, classifier: nn.Module) -> bool:
        """Load the classifier that an earlier run of this demo saved; return False if there is none."""
        folder = self.output / "parts" / "classifier"
        if not (folder / "model.safetensors").is_file():
            return False
        classifier.load_state_dict(dict(open_weights(folder).items()))
        classifier.eval()
        return True

    def _fit(self, classifier: Classifier, phase: PhaseConfig, source: LabelledImages) -> None:
        """Train the classifier, and save it."""
        folder = self.output / "phases" / "classifier"
        trackers = [ModelBuilder(self.plugins)(tracker, folder) for tracker in self.config.trackers]
        module: Any = classifier  # torch does not type memory_format
        try:
            fit(
                module.to(memory_format=torch.channels_last),
                classifier.losses,
                batches(source, phase.batch, self.config.seed),
                optimizer=phase.optimizer,
                schedule=phase.schedule,
                title="classifier",
                trackers=trackers,
                quiet=self.quiet,
            )
        finally:
            for tracker in trackers:
                tracker.close()
        write_component(self.output / "parts" / "classifier", classifier.state_dict())


def write_component(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write the weights of a component, by its own names, into a folder; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, weights.items())
    return folder


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Forward SIGINT and SIGTERM to a process, and collect them."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
