"""Asks a model the questions of a file, in batches, and scores its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from janus_modular.evaluation.caption_metrics import caption_metrics, require_metrics
from janus_modular.evaluation.ledger import open_ledger
from janus_modular.evaluation.questions import Question
from janus_modular.evaluation.results import Results, batched
from janus_modular.evaluation.schema import EvalConfig
from janus_modular.evaluation.scoring import accuracy, by_category, is_right, pope
from janus_modular.foreign import name_in_errors
from janus_modular.janus import Janus


def answer_questions(
    janus: Janus,
    questions: Sequence[Question],
    config: EvalConfig,
    out: Path,
    identity: Mapping[str, Any],
    on_progress: Callable[[int, int], None],
) -> Results:
    """Answer the questions that the ledger in ``out`` has no answer of; return the metrics of all answers.

    Raises:
        EvaluationError: the ledger is that of another evaluation.
        PromptError: a setting is unknown, or a prompt fills the context.
    """
    if config.evaluate == "captions":
        require_metrics()  # before any answer
    settings = asdict(janus.text_settings(config.settings))
    header = {
        "evaluate": config.evaluate,
        "prompt": config.prompt,
        "settings": settings,
        "model": dict(identity),
    }
    with open_ledger(out, header) as ledger:
        hashes = {question.key: question.prompt_hash(config.prompt) for question in questions}
        pending = [question for question in questions if not ledger.known(question.key, hashes[question.key])]
        done = len(questions) - len(pending)
        for batch in batched(pending, config.batch_size):
            on_progress(done, len(questions))
            pairs = [(question.prompt(config.prompt), list(question.images)) for question in batch]
            # All have the number 0, so that sampled answers do not depend on batches.
            with name_in_errors(f"{config.path}, '{batch[0].key}' to '{batch[-1].key}'"):
                answers = janus.chat_batch(pairs, **config.settings, numbers=[0] * len(batch))
            for question, answer in zip(batch, answers, strict=True):
                ledger.append(
                    {
                        "key": question.key,
                        "prompt_sha256": hashes[question.key],
                        "answer": str(answer),
                        "finish_reason": answer.finish_reason,
                        "right": is_right(question, answer),
                    }
                )
            done += len(batch)
        on_progress(done, len(questions))
        scored = [(question, str(ledger.results[question.key]["answer"])) for question in questions]
    measures = {"pope": pope, "captions": caption_metrics}
    return Results(by_category(scored, measures.get(config.evaluate, accuracy)), settings)
