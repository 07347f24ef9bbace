"""A checkpoint or a bundle as a model of lmms-eval: it answers questions about images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms

from janus_modular import ImageInput, Janus, Message, PromptError, Text, open_image

MARKER = "<image>"
"""The position of an image in a question of lmms-eval."""

MAX_TOKENS = 1024
"""Of an answer, where a task does not say it: lmms-eval's own default."""

WITHOUT_EFFECT = ("image_aspect_ratio", "use_cache")
"""Settings of tasks for other models, which cannot change an answer of this one."""


class AnsweringModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers the questions of tasks of the type ``generate_until``."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        runtime: str | None = None,
        variant: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a checkpoint or a bundle.

        Args:
            pretrained: a folder or a hub id.
            device: as of `Janus.from_pretrained`.
            dtype: likewise.
            runtime: of a bundle.
            variant: of a bundle.
            batch_size: answers that are computed at once; a number.
            max_batch_size: must be None: no batch size is searched for.

        Raises:
            ValueError: the batch size is no number.
            JanusError: the model cannot be loaded.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise ValueError(
                f"batch_size {batch_size!r}, max_batch_size {max_batch_size!r}: expected a number from 1, and"
                " no maximum."
            )
        self.batch_size = int(batch_size)
        self.janus = Janus.from_pretrained(
            pretrained, device=device, dtype=dtype, runtime=runtime, variant=variant
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers to requests, in their order; equal settings share a batch.

        Raises:
            ValueError: a setting is not supported.
            PromptError: the markers of a question differ in number from its images.
        """
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        questions, settings = [], []
        for number, request in enumerate(requests):
            context, options, doc_to_visual, doc_id, task, split = request.args
            images = doc_to_visual(self.task_dict[task][split][doc_id])
            questions.append(question(context, images))
            settings.append(sampler_settings(options))
            groups[_hashable(settings[-1])].append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                pairs = [(questions[number], ()) for number in batch]
                # All have the number 0, so that sampled answers do not depend on batches.
                batch_answers = self.janus.chat_batch(pairs, **settings[batch[0]], numbers=[0] * len(batch))
                for number, answer in zip(batch, batch_answers, strict=True):
                    answers[number] = str(answer)
                    self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise an error: tasks of several rounds are not supported."""
        raise NotImplementedError("janus_modular: tasks of several rounds are not supported; leave them out.")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise an error: tasks that compare the likelihood of texts are not supported."""
        raise NotImplementedError(
            "janus_modular: tasks of the type loglikelihood are not supported; expected generate_until."
        )


def question(context: str, images: Sequence[Any] | None) -> list[Message]:
    """Return a question with its images where the markers are, or before the text if it has none.

    Raises:
        PromptError: markers and images differ in number.
    """
    inputs = [ImageInput(open_image(image)) for image in images or ()]
    texts = context.split(MARKER)
    if len(texts) == 1:
        return [Message("user", [*inputs, Text(context.strip())])]
    if len(texts) - 1 != len(inputs):
        raise PromptError(
            f"the question {context!r:.80} has {len(texts) - 1} {MARKER} and {len(inputs)} images; expected"
            " as many of each."
        )
    content: list[Any] = [Text(texts[0])] if texts[0] else []
    for image, text in zip(inputs, texts[1:], strict=True):
        content += [image, Text(text)] if text else [image]
    return [Message("user", content)]


def sampler_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `Janus.chat_batch` for the generation settings of a task.

    Raises:
        ValueError: a setting is not supported.
    """
    remaining = {key: value for key, value in options.items() if key not in WITHOUT_EFFECT}
    until = remaining.pop("until", None) or ()
    temperature = remaining.pop("temperature", None) or 0.0
    if remaining.pop("do_sample", bool(temperature)) is False:
        temperature = 0.0
    settings = {
        "max_tokens": remaining.pop("max_new_tokens", None) or MAX_TOKENS,
        "temperature": float(temperature),
        "stop": [until] if isinstance(until, str) else list(until),
    }
    if (top_p := remaining.pop("top_p", None)) and temperature:
        settings["top_p"] = float(top_p)
    if remaining.pop("num_beams", None) not in (None, 1):
        raise ValueError("num_beams: beam search is not supported; expected 1.")
    if unknown := [key for key, value in remaining.items() if value is not None]:
        raise ValueError(
            f"the task sets {', '.join(unknown)}, which this model does not know; leave them out by"
            " --gen_kwargs."
        )
    return settings


def _hashable(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in settings.items())
