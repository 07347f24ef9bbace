"""Makes sequences of conversations, prompts and samples: the one door between people and the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from janus_modular.atomic_writes import write_text
from janus_modular.config.schema import ProcessorConfig
from janus_modular.errors import ConfigError, DataError, PromptError
from janus_modular.foreign import foreign_errors, naming, printable, read_json
from janus_modular.interfaces import PixelSpec
from janus_modular.processing.processor_record import Drawing as Drawing
from janus_modular.processing.processor_record import read_record
from janus_modular.processing.prompt_segments import PartMaker, PromptSegment, Supervise, with_supervision
from janus_modular.processing.sequence_builder import lay_out, with_pixels, without_condition
from janus_modular.processing.streaming import StopRule, TextStream
from janus_modular.processing.templates import make_template
from janus_modular.processing.text_tokenizer import TextTokenizer
from janus_modular.processing.tokenizer_files import load_tokenizer, save_tokenizer
from janus_modular.sequence import IGNORE_INDEX, ImageTarget, Message, Sample, Text, unconditional
from janus_modular.sequence import Sequence as TokenSequence

FILE = "processor.json"


class Processor:
    """Words and images in, sequences out. Needs neither the model nor torch."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: str,
        *,
        pixels: PixelSpec,
        image_tokens: int,
        drawing: Drawing | None,
        context: int | None = None,
        system: str | None = None,
        suppress_tokens: Sequence[str] = (),
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.image_tokens = image_tokens  # positions that an image to read takes
        self.drawing = drawing  # None: this model does not draw
        self.context = context  # longest sequence, in positions; None: unlimited
        # Tokens that an answer in words never holds: those that the vocabulary was given for images.
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
        if lacks := [s for s in self.template.needs if tokenizer.core.token_to_id(s) is None]:
            raise ConfigError(
                f"the template '{template}' needs {', '.join(lacks)}, which the tokenizer lacks. "
                "Choose the template that the tokenizer was made for."
            )
        if strange := [s for s in self.suppress_tokens if tokenizer.core.token_to_id(s) is None]:
            raise ConfigError(
                f"suppress_tokens has {printable(', '.join(strange))}, which the tokenizer lacks: expected"
                " tokens of its vocabulary."
            )
        self._bos = self.template.always_bos or (tokenizer.adds_bos and template != "chat")

    @classmethod
    def build(
        cls,
        config: ProcessorConfig,
        *,
        pixels: PixelSpec,
        image_tokens: int,
        drawing: Drawing | None,
        context: int | None = None,
        tokenizer: str | Path | None = None,
    ) -> Processor:
        """Build from a config; ``tokenizer`` is a local folder or file that stands in for the config's."""
        source = tokenizer or config.tokenizer
        if source is None:
            raise ConfigError(
                "processor.tokenizer is not set, and the backbone brings no tokenizer. "
                "Give a folder, a tokenizer.json, or 'bytes'."
            )
        loaded = load_tokenizer(source, config.tokens, published=config.template.startswith("janus"))
        return cls(
            loaded,
            config.template,
            pixels=pixels,
            image_tokens=image_tokens,
            drawing=drawing,
            context=context,
            system=config.system,
            suppress_tokens=config.suppress_tokens,
            template_variables=config.template_variables,
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
        """Make a training sequence.

        Learned are the segments marked as supervised, with the token that ends the assistant's turn;
        with no text marked and nothing drawn, what the assistant says, or the whole of a plain text.
        ``supervise="all"``: every text token of a sample that draws nothing, unless its
        supervision is exact. ``condition_dropout``: what
        comes before the first drawn image is replaced by pads. ``learn_image_ends``: begin-of-image
        and end-of-image of drawn images are learned too (the papers do not say; here, not unless asked).
        ``check_length=False`` leaves it to the caller to see whether the context holds it.

        Raises:
            DataError: nothing in it is learned.
            PromptError: it cannot be rendered, or is longer than the context.
        """
        sample = with_supervision(sample)
        if sample.template:
            parts, bos = self.trained_parts(sample.messages, learn_image_ends), self._bos
        else:
            parts = self._maker(learn_image_ends).document([s for m in sample.messages for s in m.content])
            bos = self.template.always_bos or self.tokenizer.adds_bos
        draws = any(isinstance(part.image, ImageTarget) for part in parts)
        if supervise == "all" and not draws and not sample.exact_supervision:
            parts = [replace(part, learned=self._is_text(part)) for part in parts]
        sequence = self._assemble(parts, bos=bos, source=sample.source, check_length=check_length)
        if condition_dropout and draws:
            sequence = without_condition(sequence, pad=self.pad_id, read=self.image_tokens)
        if not (sequence.labels != IGNORE_INDEX).any() and not any(sequence.generation_supervised):
            raise DataError(
                f"a sample of source '{sample.source}' has nothing to learn: no text marked as supervised, "
                "no answer, no image to draw. Add an answer, or leave the sample out."
            )
        return sequence

    def chat_prompt(self, messages: Sequence[Message]) -> TokenSequence:
        """Make the prompt that the assistant's next message answers.

        Raises:
            PromptError: the assistant spoke last, or the conversation cannot be rendered or is too long.
        """
        messages = list(messages)
        if messages and messages[-1].role == "assistant":
            if messages[-1].content:
                raise PromptError("the assistant spoke last: there is nothing to answer. Add a user message.")
            messages.pop()
        if not messages:
            raise PromptError("the conversation is empty. Give at least one user message.")
        return self._assemble(self.answer_parts(messages), bos=self._bos)

    def draw_prompt(self, prompt: str | Sequence[Message]) -> TokenSequence:
        """Make the prompt of an image, from a text or a conversation: it ends in begin-of-image.

        It is what a training sequence of the same conversation has before the image's codes: the image is
        the assistant's next message, or goes on with the assistant's last one.

        Raises:
            PromptError: it cannot be rendered, or there is no room for the image in the context.
        """
        if self.drawing is None:
            raise PromptError("this model has no generation path: it cannot draw.")
        messages = [Message("user", [Text(prompt)])] if isinstance(prompt, str) else list(prompt)
        return self._assemble(self.drawing_parts(messages), bos=self._bos, room=self.drawing.num_tokens)

    def trained_parts(
        self, messages: Sequence[Message], learn_image_ends: bool = False
    ) -> list[PromptSegment]:
        """Write a conversation as it is trained.

        Raises:
            PromptError: it cannot be rendered, or what precedes something that is learned is written
                otherwise where it is asked for.
        """
        return self._maker(learn_image_ends).conversation(self._with_system(messages))

    def answer_parts(self, messages: Sequence[Message]) -> list[PromptSegment]:
        """Write a conversation up to where the assistant answers it."""
        return self._maker().conversation(self._with_system(messages), answer=True)

    def drawing_parts(self, messages: Sequence[Message]) -> list[PromptSegment]:
        """Write a conversation up to where the assistant's image begins, as it is trained."""
        drawn = ImageTarget(Image.new("RGB", (1, 1)), supervised=False)
        *earlier, last = messages or [Message("user", [])]
        if last.role == "assistant":
            conversation = [*earlier, replace(last, content=[*last.content, drawn])]
        else:
            conversation = [*earlier, last, Message("assistant", [drawn])]
        parts = self.trained_parts(conversation)
        return parts[: next(i for i, part in enumerate(parts) if part.image is drawn)]

    def unconditional(self, sequence: TokenSequence) -> TokenSequence:
        """Return the row that guidance leans on: pads everywhere but at the first and the last position.

        The pads are attended to, at the same positions. Images in the prompt are dropped with the rest.
        """
        return unconditional(sequence, self.pad_id)

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """The ids of ``suppress_tokens``, which sampling words leaves out."""
        return tuple(self.tokenizer.id_of(string) for string in self.suppress_tokens)

    @property
    def pad_id(self) -> int:
        """The id that stands for a dropped condition; batches are padded with it too."""
        return self.tokenizer.id_of(self.tokenizer.names["pad"] or "")

    @cached_property
    def stop(self) -> StopRule:
        """When an answer in words is over: EOS, what ends a turn in the template, or the user's role."""
        speech = [Message("user", [Text("a")]), Message("assistant", [Text("b")])]
        pieces = [part.piece for part in self._maker().conversation(speech)]
        answered = max(i for i, piece in enumerate(pieces) if piece.text == "b")
        after = next((piece for piece in pieces[answered + 1 :] if piece.text.strip()), None)
        ends = [after.text] if after and after.special else []
        strings = [self.tokenizer.names["eos"], *ends, *self.template.stop_strings]
        ids = {s: self.tokenizer.core.token_to_id(s) for s in strings if s}
        return StopRule(
            tuple(dict.fromkeys(id for id in ids.values() if id is not None)),
            tuple(s for s, id in ids.items() if id is None),
        )

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """Open a stream that turns the tokens of one answer into text; ``stop`` strings end it too."""
        return TextStream(
            self.tokenizer, replace(self.stop, strings=(*self.stop.strings, *filter(None, stop)))
        )

    def to_dict(self) -> dict[str, Any]:
        """Describe this processor, less its tokenizer, as JSON can hold it."""
        return {
            "template": self.template_name,
            "system": self.system,
            "template_variables": self.template_variables,
            "tokens": self.tokenizer.names,
            "pixels": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.pixels).items()},
            "image_tokens": self.image_tokens,
            "drawing": self.drawing and asdict(self.drawing),
            "context": self.context,
            "suppress_tokens": list(self.suppress_tokens),
        }

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files and, as processor.json, everything else."""
        save_tokenizer(self.tokenizer, folder)
        write_text(folder / FILE, json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Processor:
        """Read what `save` wrote. Needs neither the model nor torch.

        Raises:
            ConfigError: there is no such file, or it is damaged.
        """
        file = folder / FILE
        if not file.is_file():
            raise ConfigError(f"{folder} has no {FILE}. Expected a folder that a processor was saved to.")
        description = read_json(file, ConfigError)
        hint = "Fetch the model again, or write it again from what it was converted or trained from."
        with naming(file), foreign_errors(file, ConfigError, hint):
            return cls.from_dict(description, folder)

    @classmethod
    def from_dict(cls, description: Mapping[str, Any], tokenizer: str | Path) -> Processor:
        """Rebuild a processor from `to_dict` and the folder that its tokenizer was saved to."""
        record = read_record(description)
        return cls(
            load_tokenizer(tokenizer, record.tokens),
            record.template,
            pixels=record.pixels,
            image_tokens=record.image_tokens,
            drawing=record.drawing,
            context=record.context,
            system=record.system,
            suppress_tokens=record.suppress_tokens,
            template_variables=record.template_variables,
        )

    def _maker(self, learn_image_ends: bool = False) -> PartMaker:
        return PartMaker(self.tokenizer, self.template, learn_image_ends=learn_image_ends)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Put the system text first, unless there is one, or the assistant begins with a drawing.

        How the assistant goes on decides nothing: what precedes an answer or a drawing is the same when it is
        asked for as when it is trained.
        """
        system = self.template.system if self.system is None else self.system
        spoken = (s for m in messages if m.role == "assistant" for s in m.content)
        first = next((s for s in spoken if not isinstance(s, Text) or s.text.strip()), None)
        if not system or isinstance(first, ImageTarget) or (messages and messages[0].role == "system"):
            return list(messages)
        return [Message("system", [Text(system)]), *messages]

    def _is_text(self, part: PromptSegment) -> bool:
        ends = (self.tokenizer.names["begin_image"], self.tokenizer.names["end_image"])
        return part.image is None and not (part.piece.special and part.piece.text in ends)

    def _assemble(
        self,
        parts: Sequence[PromptSegment],
        *,
        bos: bool,
        room: int = 0,
        source: str = "",
        check_length: bool = True,
    ) -> TokenSequence:
        """Encode the parts and add the pixels; ``room`` positions are kept free behind them."""
        drawing = self.drawing
        sequence = lay_out(
            self.tokenizer.encode([part.piece for part in parts]),
            parts,
            bos=self.tokenizer.named("bos") if bos else None,
            read=self.image_tokens,
            draw=drawing.num_tokens if drawing else 0,
        )
        if check_length and self.context is not None:
            check_room(len(sequence), self.context, room=room, image_tokens=self.image_tokens, source=source)
        sequence = with_pixels(
            sequence, parts, self.pixels, (drawing.height, drawing.width) if drawing else None
        )
        return replace(sequence, source=source)


def check_room(positions: int, context: int, *, room: int, image_tokens: int, source: str = "") -> None:
    """Hold a sequence of so many positions, and the ``room`` to be kept free behind it, to the context.

    Raises:
        PromptError: they are longer.
    """
    if positions + room > context:
        image = f" and {room} for the image" if room else ""
        of_source = f" (source {printable(source)!r})" if source else ""
        raise PromptError(
            f"the sequence takes {positions:,} positions{image}; the context has {context:,}{of_source}."
            f" Shorten the text, or leave out images ({image_tokens + 2} positions for each that is"
            " read)."
        )
