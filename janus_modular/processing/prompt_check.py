"""Checks before training: prompts are prefixes of training sequences, and the context is long enough."""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image

from janus_modular.errors import ConfigError, PromptError
from janus_modular.processing.processor import Processor
from janus_modular.sequence import ImageTarget, Message, Text

log = logging.getLogger(__name__)

TURNS = 3
ANSWERS = ("b", "It is", "The", "1")  # beginnings that tokenizers commonly join with whitespace before them


def check_prompts(processor: Processor) -> None:
    """Check that prompts are prefixes of training sequences, with the processor's chat template.

    The check tries answers and images as the last of one to three turns, with and without a system message
    if the template takes one. Earlier answers and images are checked in every sample, since a template that
    leaves earlier reasoning out can be used for samples without reasoning.

    A template that writes no token behind an answer to end it is used, with a warning.

    Raises:
        ConfigError: a prompt is no prefix; shows both texts where they differ, and what to set.
    """
    for system in ([], [Message("system", [Text("c")])]):
        conversation = list(system)
        for _ in range(TURNS):
            conversation.append(Message("user", [Text("a")]))
            try:
                processor.answer_segments(conversation)
            except PromptError:
                if system:  # the template takes no system message
                    break
                raise
            try:
                _check_last_turn(processor, conversation)
            except PromptError as error:
                raise ConfigError(f"processor.template: {error}") from error
            conversation.append(Message("assistant", [Text("b")]))
    if not _ends_answers(processor):
        log.warning(
            "processor.template: no token that ends an answer is learned, as the chat template writes no %s"
            " behind the last answer; answers will continue until max_tokens. Choose a template that writes"
            " the token, or add the token to this template.",
            processor.tokenizer.names["eos"] or "end-of-text token",
        )


def check_context(processor: Processor) -> None:
    """Check that the context holds an image target behind a prompt of one letter, and an image input.

    Raises:
        PromptError: the context is shorter, so that no prompt can be used.
    """
    if processor.drawing is not None:
        processor.draw_prompt("a")
    if processor.context is not None:
        check_image_fits(processor.image_tokens * processor.pixels.most_images, processor.context)


def check_image_fits(image_tokens: int, context: int) -> None:
    """Check that the context holds the longest image input, between begin-of-image and end-of-image.

    Raises:
        PromptError: the context is shorter.
    """
    framed = image_tokens + 2
    if framed > context:
        raise PromptError(
            f"an input image takes {framed:,} positions; the context has {context:,}. Give it a longer"
            " context (backbone.config.max_position_embeddings of the backbone hf), or fewer positions:"
            " smaller understanding.encoder.pixels, a lower pixels.max_tiles, or an adaptor such as"
            " pixel-unshuffle."
        )


def _ends_answers(processor: Processor) -> bool:
    """Return True if a token that stops an answer is supervised behind the answer."""
    answer = Text("b", supervised=True)
    segments = processor.trained_segments([Message("user", [Text("a")]), Message("assistant", [answer])])
    start = next(
        i for i, segment in enumerate(segments) if segment.supervised and segment.span.text == answer.text
    )
    behind = [
        segment.span.text for segment in segments[start:] if segment.supervised and segment.span.special
    ]
    ids = [processor.tokenizer.core.token_to_id(text) for text in behind]
    return not processor.stop.ids or any(id in processor.stop.ids for id in ids)


def _check_tokens(processor: Processor, conversation: list[Message], answer: str) -> None:
    """Check that the tokens of a prompt are a prefix of the tokens in training, as its text is.

    Raises:
        PromptError: the tokens of the prompt are not a prefix.
    """
    answered = [*conversation, Message("assistant", [Text(answer, supervised=True)])]
    prompt, trained = (
        processor.tokenizer.encode([segment.span for segment in segments]).ids
        for segments in (processor.answer_segments(conversation), processor.trained_segments(answered))
    )
    different = np.flatnonzero(prompt != np.resize(trained, len(prompt)))
    if len(different):
        start = max(int(different[0]) - 2, 0)
        tokens = [
            [processor.tokenizer.decode([id]) for id in ids]
            for ids in (trained[start:][:6], prompt[start:][:6])
        ]
        raise PromptError(
            f"the prompt for the answer {answer!r} has other tokens than the same text in training:\n"
            f"  trained: {tokens[0]}\n  prompt:  {tokens[1]}\n"
            "Expected a prompt that ends at the boundary of a token: remove whitespace from the end of what"
            " the tokenizer's chat_template.jinja writes before an answer, or choose another"
            " processor.template."
        )


def _check_last_turn(processor: Processor, conversation: list[Message]) -> None:
    for answer in ANSWERS:
        _check_tokens(processor, conversation, answer)
    if processor.drawing is None:
        return
    image = ImageTarget(Image.new("RGB", (1, 1)))
    trained = processor.trained_segments([*conversation, Message("assistant", [image])])
    prompt = processor.drawing_segments(conversation)
    trained = trained[: len(prompt)]
    if [segment.span for segment in trained] != [segment.span for segment in prompt]:
        texts = ["".join(segment.span.text for segment in segments) for segments in (trained, prompt)]
        raise PromptError(
            "the text before an image to draw differs between training and the prompt:\n"
            f"  trained: {texts[0]!r}\n  prompt:  {texts[1]!r}\nChoose another processor.template."
        )
