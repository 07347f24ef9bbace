"""What a processor trains, held against what it asks for and to the context, before a training begins."""

from __future__ import annotations

import logging

from PIL import Image

from janus_modular.errors import ConfigError, PromptError
from janus_modular.processing.processor import Processor, check_room
from janus_modular.sequence import ImageTarget, Message, Text

log = logging.getLogger(__name__)

TURNS = 3


def check_prompts(processor: Processor) -> None:
    """Check that prompts are beginnings of what is trained, whatever the chat template does.

    Tried are answers and drawings as the last of one to three turns, with and without a system message where
    the template takes one. Answers and drawings before the last turn are checked in every sample, since
    templates that leave earlier reasoning out may be used without them.

    A template that writes nothing behind an answer that would end it is used, with a warning.

    Raises:
        ConfigError: a prompt is no beginning; shows both texts where they differ, and what to set.
    """
    for system in ([], [Message("system", [Text("c")])]):
        conversation = list(system)
        for _ in range(TURNS):
            conversation.append(Message("user", [Text("a")]))
            try:
                processor.answer_parts(conversation)
            except PromptError:
                if system:  # the template takes none
                    break
                raise
            try:
                _check_last_turn(processor, conversation)
            except PromptError as error:
                raise ConfigError(f"processor.template: {error}") from error
            conversation.append(Message("assistant", [Text("b")]))
    if not _ends_answers(processor):
        log.warning(
            "processor.template: nothing that ends an answer is learned, as the chat template writes no %s"
            " behind the last one; answers will go on until their longest length. Choose a template that"
            " writes it, or add it to this one.",
            processor.tokenizer.names["eos"] or "end-of-text token",
        )


def check_context(processor: Processor) -> None:
    """Check that the context holds an image to draw behind a prompt of one letter, and an image to read.

    Raises:
        PromptError: no prompt could be used; says so as a prompt that is too long is refused.
    """
    if processor.drawing is not None:
        processor.draw_prompt("a")
    if processor.context is not None:
        read = processor.image_tokens
        check_room(read + 2, processor.context, room=0, image_tokens=read)  # and what frames it


def _ends_answers(processor: Processor) -> bool:
    """Return True if an answer is learned together with a token that stops it."""
    answer = Text("b", supervised=True)
    parts = processor.trained_parts([Message("user", [Text("a")]), Message("assistant", [answer])])
    answered = next(i for i, part in enumerate(parts) if part.learned and part.piece.text == answer.text)
    behind = [part.piece.text for part in parts[answered:] if part.learned and part.piece.special]
    ids = [processor.tokenizer.core.token_to_id(text) for text in behind]
    return not processor.stop.ids or any(id in processor.stop.ids for id in ids)


def _check_last_turn(processor: Processor, conversation: list[Message]) -> None:
    processor.trained_parts([*conversation, Message("assistant", [Text("b", supervised=True)])])
    if processor.drawing is None:
        return
    image = ImageTarget(Image.new("RGB", (1, 1)))
    trained = processor.trained_parts([*conversation, Message("assistant", [image])])
    asked = processor.drawing_parts(conversation)
    if [part.piece for part in trained[: len(asked)]] != [part.piece for part in asked]:
        texts = ["".join(part.piece.text for part in parts) for parts in (trained[: len(asked)], asked)]
        raise PromptError(
            "an image to draw is trained behind another text than it is asked for behind:\n"
            f"  trained: {texts[0]!r}\n  asked:   {texts[1]!r}\nChoose another processor.template."
        )
