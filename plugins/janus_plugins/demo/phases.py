"""The phases of the demo: parts trained on their own, then the stages, each from where the last one ended.

A phase that has left its result in the folder is not run again, and a stage that was interrupted is resumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from janus_modular.config import resolve, to_plain
from janus_modular.interfaces import ComponentSpec, ImageTokenizer
from janus_modular.model.build import ModelBuilder, build_model
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.training.loop import fit
from janus_modular.training.run_checkpoints import newest_checkpoint
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train
from janus_modular.weights.files import open_weights
from janus_modular.weights.writing import write_weights
from janus_plugins.demo.labelled_images import LabelledImages, as_pixels, batches
from janus_plugins.demo.networks import Classifier, Contrastive
from janus_plugins.demo.schema import DemoConfig, PhaseConfig

TOKENIZER = "generation.tokenizer"
ENCODER = "understanding.encoder"


@dataclass
class Demo:
    """A configured demo: where it writes, what it knows, and the parts that are trained by now."""

    config: DemoConfig
    output: Path
    plugins: Plugins
    quiet: bool = False
    trained: dict[str, Path] = field(default_factory=dict)  # parts of the model by path: their weights

    def open(self, part: ComponentSpec) -> LabelledImages:
        """Open a source of labelled images."""
        return cast(LabelledImages, ModelBuilder(self.plugins)(part))

    def classifier(self) -> Classifier:
        """Train the judge."""
        source = self.open(self.config.images)
        torch.manual_seed(self.config.seed)
        classifier = Classifier(len(source.names))
        classifier(as_pixels(source.images[:2]))  # its last layer learns its width
        if not self._restore("classifier", classifier):
            self._fit(classifier, "classifier", self.config.classifier, source)
            self._keep("classifier", classifier)
        return classifier

    def tokenizer(self) -> ImageTokenizer:
        """Train the image tokenizer of the drawing path."""
        tokenizer = cast(ImageTokenizer, self._model().get_submodule(TOKENIZER))
        low, high = tokenizer.value_range

        def losses(batch: tuple[Tensor, Tensor, list[str]]) -> Mapping[str, Tensor]:
            return tokenizer.losses(low + batch[0] / 255 * (high - low))

        module = cast(nn.Module, tokenizer)
        if not self._restore(TOKENIZER, module):
            self._fit(module, "tokenizer", self.config.tokenizer, self.open(self.config.images), losses)
            self._keep(TOKENIZER, module)
        self.trained[TOKENIZER] = self._folder(TOKENIZER)
        return tokenizer

    def encoder(self) -> None:
        """Train the understanding encoder against captions; one that needs no training is left alone."""
        if self.config.encoder is None:
            return
        path = self._model().understanding
        both = Contrastive(cast(nn.Module, path.encoder), path.encoder.feature_dim, path.normalize)
        if not self._restore(ENCODER, both.encoder):
            self._fit(both, "encoder", self.config.encoder, self.open(self.config.images))
            self._keep(ENCODER, both.encoder)
        self.trained[ENCODER] = self._folder(ENCODER)

    def stages(self) -> Path:
        """Train the stages; return the folder of the finished model."""
        start: dict[str, Any] = {"model": self.model_config()}
        for config in self.stage_configs(start):
            done = self._stage(config)
        model = self.output / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(done, model)
        return model

    def stage_configs(self, start: dict[str, Any]) -> Iterator[TrainConfig]:
        """Yield each stage as the training config that it is; all after the first start from the last."""
        plain = to_plain(self.config)
        shared = {key: plain[key] for key in ("sources", "trackers", "seed")} | plain["common"]
        for name, stage in plain["stages"].items():
            output = self.output / "phases" / name
            yield resolve({**shared, **stage, **start, "output": str(output)}, TrainConfig, self.plugins)
            start = {"init": str(output / "model")}

    def model_config(self) -> dict[str, Any]:
        """Return the model's config with the trained parts named as its ``pretrained`` ones."""
        model = deepcopy(to_plain(self.config.model))
        for path, folder in self.trained.items():
            part = model
            for key in path.split("."):
                part = part[key]
            part["pretrained"] = str(folder)
        return cast(dict[str, Any], model)

    def _model(self) -> JanusModel:
        torch.manual_seed(self.config.seed)
        return build_model(self.config.model, self.plugins)

    def _stage(self, config: TrainConfig) -> Path:
        output = Path(config.output)
        if (output / "model").is_dir():
            return output / "model"
        resume = newest_checkpoint(output) is not None
        if not resume:  # killed before its first checkpoint
            shutil.rmtree(output, ignore_errors=True)
        return train(config, resume=resume, quiet=self.quiet, title=output.name, plugins=self.plugins)

    def _folder(self, part: str) -> Path:
        return self.output / "parts" / part

    def _keep(self, part: str, module: nn.Module) -> None:
        self._folder(part).mkdir(parents=True, exist_ok=True)
        write_weights(self._folder(part), module.state_dict().items())

    def _restore(self, part: str, module: nn.Module) -> bool:
        """Load the weights that an earlier run of this demo kept; return whether there were any."""
        if not (self._folder(part) / "model.safetensors").is_file():
            return False
        module.load_state_dict(dict(open_weights(self._folder(part)).items()))
        module.eval()
        return True

    def _fit(
        self, module: Any, name: str, phase: PhaseConfig, source: LabelledImages, losses: Any = None
    ) -> None:
        folder = self.output / "phases" / name
        trackers = [ModelBuilder(self.plugins)(tracker, folder) for tracker in self.config.trackers]
        try:
            fit(
                module.to(memory_format=torch.channels_last),
                losses or module.losses,
                batches(source, phase.batch, self.config.seed),
                optimizer=phase.optimizer,
                schedule=phase.schedule,
                title=name,
                trackers=trackers,
                quiet=self.quiet,
            )
        finally:
            for tracker in trackers:
                tracker.close()
