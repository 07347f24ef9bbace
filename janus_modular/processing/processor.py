"""The processor: token sequences from conversations, prompts and samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from janus_modular.atomic_writes import write_text
from janus_modular.config.schema import ProcessorConfig
from janus_modular.errors import ConfigError, DataError, PromptError
from janus_modular.foreign import foreign_errors, name_in_errors, printable, read_json
from janus_modular.interfaces import PixelSpec
from janus_modular.positions import PositionRule
from janus_modular.processing.processor_record import Drawing as Drawing
from janus_modular.processing.processor_record import pixels_to_dict, read_record
from janus_modular.processing.prompt_segments import (
    PromptSegment,
    SegmentBuilder,
    Supervise,
    check_answer_starts,
    with_supervision,
)
from janus_modular.processing.sequence_builder import (
    build_sequence,
    check_context_length,
    image_blocks,
    input_pixels,
    with_targets,
    without_condition,
)
from janus_modular.processing.streaming import StopRule, TextStream
from janus_modular.processing.templates import make_template
from janus_modular.processing.text_tokenizer import TextTokenizer
from janus_modular.processing.tokenizer_files import load_tokenizer, save_tokenizer
from janus_modular.renamed import explain_renamed
from janus_modular.sequence import IGNORE_INDEX, EncodedSpec, ImageTarget, Message, Sample, Text
from janus_modular.sequence import Sequence as TokenSequence

FILE = "processor.json"


@explain_renamed
class Processor:
    """Turns text and images into token sequences. Needs neither the model nor torch."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: str,
        *,
        pixels: PixelSpec,
        image_tokens: int,
        image_tokens_follow_size: bool = False,
        drawing: Drawing | None,
        context: int | None = None,
        system: str | None = None,
        suppress_tokens: Sequence[str] = (),
        template_variables: Mapping[str, Any] | None = None,
        positions: PositionRule | None = None,
        together: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.image_tokens = image_tokens  # positions that an image input takes, or the largest in native size
        self.image_tokens_follow_size = image_tokens_follow_size  # native: a position a square of `multiple`
        self.drawing = drawing  # None: the model has no generation path
        self.encoded: EncodedSpec | None = None  # of image targets; known where the model is
        self.positions = positions  # None: the backbone's positions are a counter
        self.together = list(together or ())  # paths whose images' positions attend to each other
        self.context = context  # longest sequence, in positions; None: unlimited
        # Tokens that no answer contains: those that were added to the vocabulary for images.
        self.suppress_tokens = tuple(dict.fromkeys([*suppress_tokens, *tokenizer.added]))
        self.template_name = template
        names = tokenizer.names
        config = {k: v for k, v in tokenizer.config.items() if k.endswith("_token") and isinstance(v, str)}
        config |= {f"{name}_token": s for name in ("bos", "eos", "pad") if (s := names[name])}
        self.template_variables = dict(template_variables or {})
        self.template = make_template(
            template,
            eos=names["eos"] or "",
            tokens=config,
            chat_template=tokenizer.chat_template,
            variables=self.template_variables,
        )
        self.system = system  # None: the template's
        if missing := [s for s in self.template.required_tokens if tokenizer.core.token_to_id(s) is None]:
            raise ConfigError(
                f"the template '{template}' needs {', '.join(missing)}: not in the tokenizer's vocabulary. "
                "Choose the template that the tokenizer was made for."
            )
        if unknown := [s for s in self.suppress_tokens if tokenizer.core.token_to_id(s) is None]:
            raise ConfigError(
                f"suppress_tokens has {printable(', '.join(unknown))}: not in the tokenizer's vocabulary."
                " Name tokens of the vocabulary, or leave these out."
            )
        self._bos = self.template.always_bos or (tokenizer.adds_bos and template != "chat")

    @classmethod
    def build(
        cls,
        config: ProcessorConfig,
        *,
        pixels: PixelSpec,
        image_tokens: int,
        image_tokens_follow_size: bool = False,
        drawing: Drawing | None,
        context: int | None = None,
        positions: PositionRule | None = None,
        together: Sequence[str] | None = None,
        tokenizer: str | Path | None = None,
    ) -> Processor:
        """Build from a config; ``tokenizer``, a local folder or file, replaces the config's tokenizer."""
        source = tokenizer or config.tokenizer
        if source is None:
            raise ConfigError(
                "processor.tokenizer is not set, and there is no tokenizer beside the backbone's weights. "
                "Give a folder, a tokenizer.json, or 'bytes'."
            )
        loaded = load_tokenizer(source, config.tokens, published=config.template.startswith("janus"))
        return cls(
            loaded,
            config.template,
            pixels=pixels,
            image_tokens=image_tokens,
            image_tokens_follow_size=image_tokens_follow_size,
            drawing=drawing,
            context=context,
            system=config.system,
            suppress_tokens=config.suppress_tokens,
            template_variables=config.template_variables,
            positions=positions,
            together=together,
        )

    def sequence(
        self,
        sample: Sample,
        *,
        supervise: Supervise = "answers",
        condition_dropout: bool = False,
        learn_image_ends: bool = False,
        check_length: bool = True,
    ) -> TokenSequence:
        """Return the training sequence of a sample.

        Segments that are marked as supervised are supervised, each with the token that ends the assistant's
        turn. In a sample without such segments, the assistant's texts are supervised, or all of a plain text.

        Args:
            sample: a conversation or a plain text, with images.
            supervise: ``all`` supervises every text token of a sample without image targets, unless the
                sample's supervision is exact.
            condition_dropout: replace what precedes the first supervised image target by pads.
            learn_image_ends: supervise begin-of-image and end-of-image of image targets too (the papers do
                not say whether they are).
            check_length: raise an error if the sequence is longer than the context.

        Raises:
            DataError: nothing in the sample is supervised.
            PromptError: the sample cannot be rendered, or its sequence is longer than the context.
        """
        sample = with_supervision(sample)
        if sample.template:
            segments, bos = self.trained_segments(sample.messages, learn_image_ends), self._bos
        else:
            segments = self._segment_builder(learn_image_ends).document(
                [segment for message in sample.messages for segment in message.content]
            )
            bos = self.template.always_bos or self.tokenizer.adds_bos
        has_target = any(isinstance(segment.image, ImageTarget) for segment in segments)
        if supervise == "all" and not has_target and not sample.exact_supervision:
            segments = [replace(segment, supervised=self._is_text(segment)) for segment in segments]
        sequence = self._assemble(segments, bos=bos, source=sample.source, check_length=check_length)
        if condition_dropout and has_target:
            hidden = self.drawing is not None and self.drawing.hidden_condition
            sequence = without_condition(sequence, pad=self.pad_id, hidden=hidden)
        if not (sequence.labels != IGNORE_INDEX).any() and not any(sequence.generation_supervised):
            raise DataError(
                f"a sample of source '{sample.source}' has nothing to learn: no supervised text, no answer, "
                "no image to draw. Add an answer, or leave the sample out."
            )
        return sequence

    def chat_prompt(self, messages: Sequence[Message]) -> TokenSequence:
        """Return the prompt for the assistant's next message.

        Raises:
            PromptError: the last message is the assistant's, or the conversation is too long or cannot be
                rendered.
        """
        messages = list(messages)
        if messages and messages[-1].role == "assistant":
            if messages[-1].content:
                raise PromptError(
                    "the last message is the assistant's: there is nothing to answer. Add a user message."
                )
            messages.pop()
        if not messages:
            raise PromptError("the conversation is empty. Give at least one user message.")
        return self._assemble(self.answer_segments(messages), bos=self._bos)

    def draw_prompt(self, prompt: str | Sequence[Message], *, positions: int | None = None) -> TokenSequence:
        """Return the prompt of an image, from a text or a conversation; the prompt ends in begin-of-image.

        ``positions``: how many the image takes, if not as many as in the model's own size.

        A training sequence of the same conversation has the same tokens before the image: the image is the
        assistant's next message, or continues the assistant's last message.

        Raises:
            PromptError: the prompt cannot be rendered, or the context does not hold the prompt and the image.
        """
        if self.drawing is None:
            raise PromptError("this model has no generation path: it cannot draw.")
        messages = [Message("user", [Text(prompt)])] if isinstance(prompt, str) else list(prompt)
        reserved = self.drawing.num_tokens if positions is None else positions
        return self._assemble(self.drawing_segments(messages), bos=self._bos, reserved=reserved)

    def trained_segments(
        self, messages: Sequence[Message], learn_image_ends: bool = False
    ) -> list[PromptSegment]:
        """Return the segments of a conversation in training.

        Raises:
            PromptError: the conversation cannot be rendered, or the prompt for something supervised is no
                prefix of the conversation.
        """
        return self._segment_builder(learn_image_ends).conversation(self._with_system(messages))

    def answer_segments(self, messages: Sequence[Message]) -> list[PromptSegment]:
        """Return the segments of a conversation up to where the assistant's answer begins."""
        return self._segment_builder().conversation(self._with_system(messages), answer=True)

    def drawing_segments(self, messages: Sequence[Message]) -> list[PromptSegment]:
        """Return the segments of a conversation in training, up to where the assistant's image begins."""
        target = ImageTarget(Image.new("RGB", (1, 1)), supervised=False)
        *earlier, last = messages or [Message("user", [])]
        if last.role == "assistant":
            conversation = [*earlier, replace(last, content=[*last.content, target])]
        else:
            conversation = [*earlier, last, Message("assistant", [target])]
        segments = self.trained_segments(conversation)
        return segments[: next(i for i, segment in enumerate(segments) if segment.image is target)]

    def image_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of positions of an image input whose pixels have this size.

        Where positions have no rows and columns, they count as one row.
        """
        if self.image_tokens_follow_size:
            side = self.pixels.multiple or 1
            return height // side, width // side
        return self.positions.grid if self.positions else (1, self.image_tokens)

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """The ids of ``suppress_tokens``, which are never sampled in answers."""
        return tuple(self.tokenizer.id_of(string) for string in self.suppress_tokens)

    @property
    def pad_id(self) -> int:
        """The id of padding, in batches and in place of a dropped condition."""
        return self.tokenizer.id_of(self.tokenizer.names["pad"] or "")

    @cached_property
    def stop(self) -> StopRule:
        """When an answer ends: at EOS, at the template's end of a turn, or at the user's role."""
        messages = [Message("user", [Text("a")]), Message("assistant", [Text("b")])]
        spans = [segment.span for segment in self._segment_builder().conversation(messages)]
        return StopRule.after("b", spans, self.tokenizer, self.template.stop_strings)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """Return a stream that turns the tokens of one answer into text; ``stop`` strings end it too."""
        return TextStream(
            self.tokenizer, replace(self.stop, strings=(*self.stop.strings, *filter(None, stop)))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of processor.json: everything but the tokenizer."""
        return {
            "template": self.template_name,
            "system": self.system,
            "template_variables": self.template_variables,
            "tokens": self.tokenizer.names,
            "pixels": pixels_to_dict(self.pixels),
            "image_tokens": self.image_tokens,
            **({"image_tokens_follow_size": True} if self.image_tokens_follow_size else {}),
            "drawing": self.drawing and self.drawing.to_dict(),
            "context": self.context,
            "suppress_tokens": list(self.suppress_tokens),
            **({"positions": asdict(self.positions)} if self.positions else {}),
            **({"together": self.together} if self.together else {}),
        }

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, and processor.json."""
        save_tokenizer(self.tokenizer, folder)
        write_text(folder / FILE, json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Processor:
        """Read the files of `save`. Needs neither the model nor torch.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        file = folder / FILE
        if not file.is_file():
            raise ConfigError(f"{folder} has no {FILE}. Expected a folder that a processor was saved to.")
        description = read_json(file, ConfigError)
        hint = "Fetch the model again, or write it again from what it was converted or trained from."
        with name_in_errors(file), foreign_errors(file, ConfigError, hint):
            return cls.from_dict(description, folder)

    @classmethod
    def from_dict(cls, description: Mapping[str, Any], tokenizer: str | Path) -> Processor:
        """Rebuild a processor from `to_dict` and the folder of its tokenizer."""
        record = read_record(description)
        return cls(
            load_tokenizer(tokenizer, record.tokens),
            record.template,
            pixels=record.pixels,
            image_tokens=record.image_tokens,
            image_tokens_follow_size=record.image_tokens_follow_size or False,
            drawing=record.drawing,
            context=record.context,
            system=record.system,
            suppress_tokens=record.suppress_tokens,
            template_variables=record.template_variables,
            positions=record.positions,
            together=record.together,
        )

    def _segment_builder(self, learn_image_ends: bool = False) -> SegmentBuilder:
        return SegmentBuilder(self.tokenizer, self.template, learn_image_ends=learn_image_ends)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Put the system text first, unless there is a system message or the assistant begins with an image.

        Only the assistant's first segment decides, so that prompts are prefixes of training sequences.
        """
        system = self.template.system if self.system is None else self.system
        content = (
            segment for message in messages if message.role == "assistant" for segment in message.content
        )
        first = next(
            (segment for segment in content if not isinstance(segment, Text) or segment.text.strip()), None
        )
        if not system or isinstance(first, ImageTarget) or (messages and messages[0].role == "system"):
            return list(messages)
        return [Message("system", [Text(system)]), *messages]

    def _is_text(self, segment: PromptSegment) -> bool:
        ends = (self.tokenizer.names["begin_image"], self.tokenizer.names["end_image"])
        return segment.image is None and not (segment.span.special and segment.span.text in ends)

    def _assemble(
        self,
        segments: Sequence[PromptSegment],
        *,
        bos: bool,
        reserved: int = 0,
        source: str = "",
        check_length: bool = True,
    ) -> TokenSequence:
        """Return the sequence of segments, with pixels; ``reserved`` positions stay free behind it."""
        drawing = self.drawing
        encoded = self.tokenizer.encode([segment.span for segment in segments])
        check_answer_starts(self.tokenizer, encoded, segments)
        inputs = input_pixels(segments, self.pixels)
        grids = [[self.image_grid(*image.shape[1:]) for image in images] for images in inputs]
        sequence = build_sequence(
            encoded,
            segments,
            bos=self.tokenizer.special_id("bos") if bos else None,
            input_counts=[[rows * columns for rows, columns in of_image] for of_image in grids],
            drawing_tokens=drawing.num_tokens if drawing else 0,
        )
        if check_length and self.context is not None:
            tokens = self.image_tokens * self.pixels.most_images
            check_context_length(
                len(sequence), self.context, reserved=reserved, image_tokens=tokens, source=source
            )
        size = (drawing.height, drawing.width) if drawing else None
        sequence = with_targets(sequence, segments, size, self.encoded)
        pixels = [image for images in inputs for image in images]
        ids = self.positions.ids(sequence, [*chain(*grids)]) if self.positions else None
        together = image_blocks(sequence) if self.together else None
        return replace(
            sequence, source=source, understanding_pixels=pixels, position_ids=ids, together=together
        )
