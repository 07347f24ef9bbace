"""What an engine does for a request: the runs of samplers, and the events that they cause."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from janus_modular import arguments, samplers
from janus_modular.answers import Answer, AnswerRow, Drawings, usage_of
from janus_modular.errors import PromptError
from janus_modular.image_sizes import chosen_size
from janus_modular.processing.image_io import to_image
from janus_modular.protocols import CodeSamplerSettings, EncodedImages, TokenSteps
from janus_modular.serving.drawing_record import DrawingRecord
from janus_modular.serving.drawn_codes import CodeGraphs, DrawnCodes, partial_steps
from janus_modular.serving.requests import (
    AnswerRequest,
    DrawRequest,
    Event,
    PartialImage,
    Progress,
    TextDelta,
)
from janus_modular.serving.row_view import RowView
from janus_modular.serving.tasks import Mode

if TYPE_CHECKING:
    from janus_modular.janus import Janus

Emit = Callable[[Event], None]
OnToken = Callable[[], None]

log = logging.getLogger(__name__)


class Work(ABC):
    """A checked request: one or several runs of a sampler, numbered from 0."""

    mode: Mode
    runs: int  # that it takes
    max_seq_len: int  # of each run, as if it ran alone

    @abstractmethod
    def run(self, number: int, view: RowView, emit: Emit, on_token: OnToken) -> Any:
        """Run the sampler; called in a task of the batch.

        ``on_token`` is called after each token or code, also where no event follows: a text that ends within
        a letter is not emitted yet.
        """

    @abstractmethod
    def result(self, results: list[Any]) -> Answer | Drawings:
        """Return the result of the request from those of its runs, in order."""


class AnswerWork(Work):
    """An answer in text."""

    mode: Mode = "answer"
    runs = 1

    def __init__(self, janus: Janus, request: AnswerRequest, limit: int) -> None:
        """Check the request; ``limit`` is how many positions a row of the engine holds.

        Raises:
            PromptError: the prompt or a setting is invalid, or the answer does not fit into a row.
        """
        settings = samplers.chosen(request.settings, seed=request.seed, max_tokens=request.max_new_tokens)
        self.name = janus.runtime.text_sampler
        self.sampler, chosen = samplers.with_settings(janus.plugins, "text_samplers", self.name, settings)
        stop = arguments.stop_strings(request.stop)
        self.prompt = janus.processor.chat_prompt(arguments.conversation(request.prompt, request.images))
        context, positions = janus.runtime.context, len(self.prompt)
        if positions >= context:
            raise PromptError(f"the prompt has {positions} positions, the context {context}: shorten it")
        self.row = AnswerRow(
            janus.processor.stream(stop),
            chosen,
            prompt=self.prompt,
            context=context,
            begin_image=janus.processor.tokenizer.special_id("begin_image"),
        )
        self.max_seq_len = positions + self.row.max_tokens
        check_fits(positions, self.row.max_tokens, "tokens of an answer", limit)
        self.settings = samplers.with_numbers(replace(chosen, max_tokens=self.row.max_tokens), [self.prompt])

    def run(self, number: int, view: RowView, emit: Emit, on_token: OnToken) -> Answer:
        """Answer, with an event for each text."""
        steps = _noted(self.sampler(view, [self.prompt], self.settings), on_token)
        for _, text in samplers.stream_texts(self.name, steps, [self.row]):
            emit(TextDelta(text))
        return self.row.answer

    def result(self, results: list[Any]) -> Answer:
        """Return the answer."""
        answer: Answer = results[0]
        return answer


class DrawWork(Work):
    """Images, each in a run of its own: its result does not depend on the others."""

    mode: Mode = "draw"

    def __init__(
        self, janus: Janus, request: DrawRequest, limit: int, code_graphs: CodeGraphs | None
    ) -> None:
        """Check the request; ``limit`` is how many positions a row of the engine holds.

        Raises:
            PromptError: the prompt or a setting is invalid, or the image does not fit into a row.
        """
        self.request = request
        self.runs = arguments.count(request.n, "n")
        settings = samplers.chosen(
            request.settings,
            seed=request.seed,
            guidance=request.guidance,
            temperature=request.temperature,
        )
        self.name = janus.runtime.image_sampler
        self.sampler, self.settings = samplers.with_settings(
            janus.plugins, "image_samplers", self.name, settings
        )
        [text] = arguments.texts([request.prompt], "prompt", "a text")
        [messages] = arguments.drawing_conversations(text, request.images, request.image_form)
        self.size = chosen_size(janus.runtime, janus.processor, request.size)
        drawing = janus.processor.drawing
        own = drawing.num_tokens if drawing else 0
        self.image_tokens = self.size.positions if self.size else own
        self.prompt = janus.processor.draw_prompt(messages, positions=self.image_tokens)
        if self.size and code_graphs:
            code_graphs = replace(code_graphs, positions=self.size.positions)
        self.max_seq_len = len(self.prompt) + self.image_tokens
        check_fits(len(self.prompt), self.image_tokens, "positions of an image", limit)
        self.code_graphs = code_graphs
        self.partial_steps = check_partial_images(request.partial_images, code_graphs)
        numbered = samplers.with_numbers(self.settings, [self.prompt] * self.runs)
        self.numbers = numbered.numbers
        self.done = [0] * self.runs
        self.record: DrawingRecord | None = None  # in the engine's journal

    def record_in(self, record: DrawingRecord, model: str | None) -> None:
        """Record codes, and go on from those that are recorded; ``model``: the fingerprint, None: unknown.

        Where the model or its sampler cannot go on, everything is drawn again, and the log says why.
        """
        self.record = record
        if not record.was_read:
            return
        reason = self.restart_reason
        if not reason and record.count and (model is None or record.model != model):
            reason = "another model began it" if model else "its runtime has no fingerprint of the model"
        if reason:
            log.warning("the drawing %s is drawn again from its seed: %s.", record.request_id, reason)
            if record.count:
                record.restart(model)

    @property
    def restart_reason(self) -> str:
        """Why the sampler cannot go on from codes that were drawn before; empty if it can."""
        if self.code_graphs is None:
            return "its generation path does not draw code by code"
        if not isinstance(self.settings, CodeSamplerSettings):
            return f"the settings of the image sampler '{self.name}' are no CodeSamplerSettings"
        return "" if self.code_graphs.can_embed else "the model has no graph that embeds codes"

    def _known(self, number: int) -> Sequence[Any]:
        """Return the codes of an image that were drawn before."""
        return () if self.record is None else self.record.codes.get(number, ())

    def run(self, number: int, view: RowView, emit: Emit, on_token: OnToken) -> EncodedImages:
        """Draw an image, with an event for each step, and for each partial image."""
        if self.size is not None:
            view.draw_at(self.size)
        settings, drawn = replace(self.settings, numbers=(self.numbers[number],)), None
        if isinstance(settings, CodeSamplerSettings):
            settings = replace(settings, prefix=[*settings.prefix, *self._known(number)])
        if self.code_graphs is not None:
            prefix = settings.prefix if isinstance(settings, CodeSamplerSettings) else ()
            add = partial(self.record.add, number) if self.record and not self.restart_reason else None
            drawn = DrawnCodes(view, self.code_graphs, prefix, add)

        def on_progress(done: int, total: int) -> None:
            before, self.done[number] = self.done[number], done
            on_token()
            emit(Progress(sum(self.done), total * self.runs))
            if drawn is not None:
                drawn.advance(done)
                for partial_image in [i for step, i in self.partial_steps.items() if before < step <= done]:
                    emit(PartialImage(to_image(drawn.decode()), number, partial_image))

        if drawn is not None and self._known(number) and drawn.is_complete:
            on_progress(drawn.count, drawn.count)
            return EncodedImages(drawn.decode()[None], drawn.codes[None])
        steps = self.sampler(view, [self.prompt], settings)
        return samplers.draw_images(self.name, steps, 1, on_progress)

    def result(self, results: list[Any]) -> Drawings:
        """Return the images, in order."""
        images = [to_image(drawn.images[0]) for drawn in results]
        encoded = [np.asarray(drawn.encoded[0]) for drawn in results if drawn.encoded is not None]
        usage = [usage_of(self.prompt, image_tokens=self.image_tokens)] * self.runs
        return Drawings(images, usage, asdict(self.settings), encoded or None)


def _noted(steps: TokenSteps, on_token: OnToken) -> Generator[Any, Any, None]:
    """Yield the tokens of a sampler, each after a call of ``on_token``."""
    active: Any = None
    while True:
        try:
            tokens = steps.send(active)
        except StopIteration:
            return
        on_token()
        active = yield tokens


def work_for(
    janus: Janus, request: AnswerRequest | DrawRequest, limit: int, code_graphs: CodeGraphs | None
) -> Work:
    """Check a request; return its work.

    Raises:
        PromptError: the request is invalid, or does not fit into a row of ``limit`` positions.
    """
    if not isinstance(request, AnswerRequest | DrawRequest):
        raise PromptError(f"found the request {request!r:.80}; expected an AnswerRequest or a DrawRequest.")
    arguments.seconds(request.deadline, "deadline")
    if not isinstance(request.request_id, str | None):
        raise PromptError(f"request_id: found {request.request_id!r:.80}; expected a text, or None.")
    if isinstance(request, AnswerRequest):
        return AnswerWork(janus, request, limit)
    return DrawWork(janus, request, limit, code_graphs)


def check_fits(prompt: int, generated: int, unit: str, limit: int) -> None:
    """Raise PromptError unless a prompt and what is generated after it fit into a row."""
    if prompt + generated > limit:
        raise PromptError(
            f"the prompt has {prompt} positions, and up to {generated} {unit} follow; expected {limit} at"
            " most together, max_seq_len of the engine. Shorten the prompt, ask for fewer, or open the engine"
            " with more."
        )


def check_partial_images(count: int, code_graphs: CodeGraphs | None) -> dict[int, int]:
    """Return after which steps an image's partial images are decoded.

    Raises:
        PromptError: there are more than steps, or the model does not draw code by code.
    """
    most = code_graphs.positions // 2 if code_graphs else 0
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= most:
        reason = "" if code_graphs else ": its generation path does not draw code by code"
        raise PromptError(
            f"partial_images: found {count!r:.80}; expected 0 to {most}, as this model draws{reason}."
        )
    return partial_steps(count, code_graphs.positions) if code_graphs else {}
