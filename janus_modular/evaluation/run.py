"""Runs an evaluation of any format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_modular.errors import EvaluationError
from janus_modular.evaluation.answering import answer_questions
from janus_modular.evaluation.benchmarks import BenchmarkPrompt, read_prompts
from janus_modular.evaluation.drawing import draw_prompts
from janus_modular.evaluation.ledger import write_errors
from janus_modular.evaluation.questions import Question, read_questions
from janus_modular.evaluation.reconstruction import image_files, reconstruct_images
from janus_modular.evaluation.results import Results
from janus_modular.evaluation.schema import QUESTIONS, EvalConfig
from janus_modular.foreign import path_exists, printable
from janus_modular.janus import Janus


@dataclass(frozen=True)
class EvalData:
    """What is evaluated: questions, prompts, or images."""

    questions: Sequence[Question] = ()
    prompts: Sequence[BenchmarkPrompt] = ()
    images: Sequence[Path] = ()
    compared_images: Sequence[Path] = ()


def read_data(config: EvalConfig) -> EvalData:
    """Read and check all data of an evaluation, which takes no model.

    Raises:
        EvaluationError: there is no data, or a question, a prompt or an image file cannot be used; names line
            and field.
    """
    for field, value in (("path", config.path), ("images", config.images)):
        if value is not None and not path_exists(value):
            raise EvaluationError(
                f"{field}: there is no file or folder '{printable(value)}'; expected the data of"
                f" '{config.evaluate}', which is not shipped. Fetch it, and set {field}=PATH."
            )
    path = Path(config.path).expanduser()
    if config.evaluate == "reconstruction":
        return EvalData(images=image_files(path))
    if config.evaluate == "image-sets":
        return EvalData(
            images=image_files(path), compared_images=image_files(Path(str(config.images)).expanduser())
        )
    if config.evaluate == "clip-score":
        folder = Path(config.images).expanduser() if config.images else path.parent
        return EvalData(questions=read_questions("captions", path, folder, config.ignore))
    if config.evaluate in QUESTIONS:
        images = Path(config.images).expanduser() if config.images else path.parent
        return EvalData(read_questions(config.evaluate, path, images, config.ignore, config.prompt))
    return EvalData(prompts=read_prompts(config.evaluate, path, config.images_per_prompt))


def run_evaluation(
    janus: Janus,
    data: EvalData,
    config: EvalConfig,
    out: Path,
    identity: Mapping[str, Any],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Results:
    """Evaluate a model; continue where an interrupted evaluation with the same folder ended.

    ``identity`` describes the model in the ledger, see `janus_modular.evaluation.ledger.identity_of`.

    Raises:
        EvaluationError: the folder cannot be written, or has another evaluation.
    """
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if config.evaluate == "reconstruction":
        return reconstruct_images(janus, data.images, config, on_progress)
    if config.evaluate in ("image-sets", "clip-score"):
        from janus_modular.evaluation.image_sets import clip_score, compare_image_sets  # which need torch

    if config.evaluate == "image-sets":
        return compare_image_sets(janus, data.images, data.compared_images, config, on_progress)
    if config.evaluate == "clip-score":
        return clip_score(data.questions, config, on_progress)
    if config.evaluate in QUESTIONS:
        return answer_questions(janus, data.questions, config, out, identity, on_progress)
    return draw_prompts(janus, data.prompts, config, out, identity, on_progress)
