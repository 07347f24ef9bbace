"""Validation during training: losses of held-out samples, drawings and answers, as metrics and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from janus_modular.arguments import conversation
from janus_modular.atomic_writes import atomic_replace, write_text
from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.config.errors import FieldError, config_error
from janus_modular.errors import ConfigError, JanusError, PromptError, TrainingError
from janus_modular.foreign import reason
from janus_modular.janus import Janus
from janus_modular.model.model import JanusModel
from janus_modular.objectives import Objective
from janus_modular.plugins import Plugins
from janus_modular.processing.image_io import open_image
from janus_modular.protocols import LogsImages, LogsTexts, Source, Tracker
from janus_modular.samplers import with_settings
from janus_modular.training.compilation import uncompiled
from janus_modular.training.engine import Engine
from janus_modular.training.mixture import Mixture, MixturePhase
from janus_modular.training.objective import (
    Multimodal,
    compares_examples,
    loss_sums,
    reads_examples,
    to_device,
)
from janus_modular.training.processes import Processes
from janus_modular.training.run_folder import VALIDATION, step_name
from janus_modular.training.sampler_check import image_sampler_mismatch
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import BatchBuilder, with_equal_passes
from janus_modular.training.step_builder import StepBatch, StepBuilder
from janus_modular.training.trackers import tracker_errors


class Validation:
    """Measures the model of a run between its steps, always on the same samples and from the same noise.

    All processes of a run take part: each computes the losses of its share of the samples, and all of them
    draw and answer, as sharded components need; the first of them writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        sources: Mapping[str, Source],
        builder: StepBuilder,
        plugins: Plugins,
        objective: Objective | None = None,
    ) -> None:
        """Prepare the samples: an unusable one is an error before the run.

        Raises:
            DataError: a sample cannot be used.
            ConfigError: an image of a question cannot be read, or a process would have no sample of a source.
        """
        self.config = config.validation
        self.output = Path(config.output) / VALIDATION
        self.plugins = plugins
        self.objective: Objective = objective or Multimodal()
        self.is_sharded = "fsdp" in config.parallel.values() and isinstance(builder, BatchBuilder)
        self.reads_examples = reads_examples(self.objective)
        self.batches = {name: _held_out(name, source, builder, config) for name, source in sources.items()}
        self.questions = [
            (question["text"], [_image(path) for path in question.get("images", ())])
            for question in self.config.questions
        ]

    def check_prompts(self, assembly: ModelAssembly) -> None:
        """Check that the context holds each prompt with its image, and each question with its images.

        Raises:
            ConfigError: lists every prompt and question that it does not hold, or that cannot be rendered.
        """
        processor, context = assembly.processor, assembly.model.backbone.context
        errors = []
        for prompt in self.config.prompts:
            try:
                processor.draw_prompt(prompt)
            except PromptError as error:
                errors.append(FieldError(f"validation.prompts: {prompt!r:.60}", str(error), ""))
        for question, images in self.questions:
            try:
                length = len(processor.chat_prompt(conversation(question, images)))
                if length >= context:
                    raise PromptError(f"{length} positions; the context has {context}: shorten it")
            except PromptError as error:
                errors.append(FieldError(f"validation.questions: {question!r:.60}", str(error), ""))
        if errors:
            raise config_error(errors, of_components=False)

    def is_due(self, done: int, last: int) -> bool:
        """Return True if the model is to be validated after ``done`` steps of ``last``."""
        return bool(self.config.every) and (done % self.config.every == 0 or done == last)

    def run(
        self, assembly: ModelAssembly, engine: Engine[StepBatch], trackers: Sequence[Tracker]
    ) -> dict[str, float]:
        """Validate the model after the finished steps, and return its losses by metric.

        The state of the run stays as it is.

        Raises:
            TrainingError: a file cannot be written, or a loss is not finite.
        """
        processes, done = engine.processes, engine.next_step
        use_averages = engine.averages and self.config.weights == "ema"
        weights = engine.averages.applied() if engine.averages and use_averages else nullcontext()
        with weights, evaluating(engine.module, engine.device, engine.autocast):
            step = max(0, done - 1)
            sums = processes.sum_means(self.losses(assembly.model, engine.device, processes, step))
            drawings, answers = self.samples(assembly)
        values = {name: total / count for name, (total, count) in sums.items()}
        if wrong := [name for name, value in values.items() if not isfinite(value)]:
            raise TrainingError(
                f"after step {done}: {', '.join(wrong)} is not finite; expected finite losses. Lower"
                " optimizer.lr."
            )
        processes.on_first(lambda: self.write(done, values, drawings, answers, trackers))
        return values

    @torch.no_grad()
    def losses(
        self, model: JanusModel, device: torch.device, processes: Processes, step: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Return the sums of losses of this process's samples and their numbers, by metric.

        ``validation/SOURCE`` is the mean over all supervised positions, as in training, and
        ``validation/SOURCE/LOSS`` that of one of its losses. Of an objective that reads examples,
        ``validation/SOURCE`` is the sum of the losses' means, and its metrics are there too.
        """
        sums: dict[str, tuple[float, float]] = {}

        def add(metric: str, total: float, count: float) -> None:
            before = sums.get(metric, (0.0, 0.0))
            sums[metric] = (before[0] + total, before[1] + count)

        for name, step_batch in self.batches.items():
            batches = (
                with_equal_passes(step_batch.batches, processes) if self.is_sharded else step_batch.batches
            )
            for batch in batches:
                losses = self.objective.losses(model, moved := to_device(batch, device), step=step)
                examples = len(next(iter(moved.values()))) if self.reads_examples else 0
                if self.reads_examples:
                    add(f"validation/{name}", 0.0, examples)
                for loss, (value, count) in loss_sums(losses, moved).items():
                    add(f"validation/{name}/{loss}", float(value), count)
                    add(f"validation/{name}", float(value), 0 if self.reads_examples else count)
                for metric, (total, weight) in losses.metrics.items() if self.reads_examples else ():
                    add(f"validation/{name}/{metric}", float(total), float(weight))
        is_counted = processes.is_first or not compares_examples(self.objective)
        return sums if is_counted else dict.fromkeys(sums, (0.0, 0.0))

    def samples(self, assembly: ModelAssembly) -> tuple[list[Image.Image], list[dict[str, str]]]:
        """Return a drawing for each prompt, and each question with its answer."""
        janus = Janus.of(assembly, self.plugins)
        drawings, answers = list[Image.Image](), list[dict[str, str]]()
        if self.config.prompts:
            drawings = janus.draw(
                self.config.prompts,
                guidance=self.config.guidance,
                temperature=self.config.temperature,
                seed=0,
            )
        if self.questions:
            texts = janus.chat_batch(self.questions, max_tokens=self.config.max_tokens)
            answers = [
                {"question": question, "answer": str(answer)}
                for (question, _), answer in zip(self.questions, texts, strict=True)
            ]
        return drawings, answers

    def write(
        self,
        done: int,
        values: Mapping[str, float],
        drawings: Sequence[Image.Image],
        answers: Sequence[Mapping[str, str]],
        trackers: Sequence[Tracker],
    ) -> None:
        """Log losses, drawings and answers; write ``validation/step-N/drawing-0.png`` and ``answers.json``.

        Raises:
            TrainingError: a file cannot be written.
        """
        folder = self.output / step_name(done)
        pairs = zip(self.config.prompts, drawings, strict=True)
        images = {f"validation/{prompt}": image for prompt, image in pairs}
        texts = {
            f"validation/answer-{number}": f"{answer['question']}\n\n{answer['answer']}"
            for number, answer in enumerate(answers)
        }
        try:
            for number, image in enumerate(drawings):
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_replace(folder / f"drawing-{number}.png", error=TrainingError) as temporary:
                    image.save(temporary, "PNG")
            if answers:
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(list(answers), indent=2, ensure_ascii=False)
                write_text(folder / "answers.json", text + "\n")
        except OSError as error:
            raise TrainingError(f"{folder} cannot be written: {reason(error)}. Is the disk full?") from error
        for tracker in trackers:
            with tracker_errors(tracker, f"the validation after step {done}"):
                if values:
                    tracker.log(done, values)
                if images and isinstance(tracker, LogsImages):
                    tracker.log_images(done, images)
                if texts and isinstance(tracker, LogsTexts):
                    tracker.log_texts(done, texts)


def check_samplers(config: TrainConfig, model: JanusModel, plugins: Plugins) -> None:
    """Check that the model's samplers take the settings of validation, and fit the model. No file is read.

    Raises:
        ConfigError: lists every setting that a sampler refuses, or says why it cannot drive the model.
    """
    validation = config.validation
    drawing = {"guidance": validation.guidance, "temperature": validation.temperature}
    settings = {key: ("image_samplers", model.image_sampler, value) for key, value in drawing.items()}
    if validation.questions:
        settings["max_tokens"] = ("text_samplers", model.text_sampler, validation.max_tokens)
    errors = []
    for key, (slot, name, value) in settings.items():
        try:
            if value is not None:
                with_settings(plugins, slot, name, {key: value})
        except JanusError as error:
            text = str(error).removeprefix(f"{key}: ")
            errors.append(FieldError(f"validation.{key}", text, ""))
    if validation.prompts and not errors and (mismatch := image_sampler_mismatch(model, plugins)):
        errors.append(FieldError("validation.prompts", mismatch, ""))
    if errors:
        raise config_error(errors, of_components=False)


@contextmanager
def evaluating(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """Switch off dropout, running statistics and compilation; restore modes and the random state."""
    training = [module for module in model.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            uncompiled(),
            torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
            torch.autocast(device.type, autocast, enabled=autocast is not None),
        ):
            model.eval()
            yield
    finally:
        model.eval()
        for module in training:
            module.training = True


def _held_out(name: str, source: Source, builder: StepBuilder, config: TrainConfig) -> StepBatch:
    """Return this process's share of a held-out source's samples, each of them once, as micro-batches."""
    count = min(config.validation.samples, len(source))
    if count < builder.world:
        raise ConfigError(
            f"validation: {count} samples of {name} (validation.samples is {config.validation.samples}, the"
            f" source has {len(source)}); expected at least {builder.world}, one for each process."
        )
    per_pass = max(1, config.batch // config.accumulate)
    mixture = Mixture({name: source}, [MixturePhase({name: 1.0})], count, seed=0)
    return builder.held_out(mixture, -(-count // per_pass)).build(0)


def _image(path: str) -> Image.Image:
    try:
        return open_image(path)
    except Exception as error:
        raise ConfigError(f"validation.questions: {error}") from error
