"""A conversation in the terminal: questions, and commands that begin with a slash."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from janus_modular.cli.options import collect_settings
from janus_modular.cli.replies import next_drawing, write_reply
from janus_modular.errors import JanusError

if TYPE_CHECKING:
    from janus_modular.answers import Answer
    from janus_modular.cli.terminal_images import Encoder
    from janus_modular.janus import Janus
    from janus_modular.sequence import Message

HELP = """\
/image FILE      add an image to your next message
/draw PROMPT     draw an image into a new file drawing-N.png in this folder
/set NAME=VALUE  change a setting of answers and drawings, such as guidance=2
/save FILE       write the conversation as a line of training data (JSON Lines)
/reset           start again
/help            list these commands
/quit            end; Ctrl-D does too, Ctrl-C stops an answer or a drawing"""

ARGUMENTS = {"/image": "a file", "/draw": "a prompt", "/save": "a file", "/set": "NAME=VALUE"}

HISTORY_LINES = 1000


class Conversation:
    """What was said so far, and the images that belong to the next message."""

    def __init__(
        self,
        janus: Janus,
        system: str | None,
        images: list[Path],
        *,
        model: str,
        options: Mapping[str, Any] | None = None,
        encode: Encoder | None = None,
        reply_options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Begin a conversation.

        Args:
            janus: answers and draws.
            system: the system message; None: the model's.
            images: of the first message.
            model: the checkpoint or the bundle, as a command names it; drawings record it.
            options: of a command that opens the model again; drawings record them too.
            encode: encodes drawings for the terminal; None: they are only written into files.
            reply_options: options of `Janus.converse`, which answers with images; None: text alone.
            **settings: of answers, as `Janus.chat` takes them.

        Raises:
            ImageError: an image cannot be read.
        """
        self.janus, self.settings = janus, settings
        self.system, self.encode, self.reply_options = system, encode, reply_options
        self.model, self.options = model, options or {}
        self.drawing_settings: dict[str, Any] = {}
        self.drawings = 0
        self.reset()
        for path in images:
            self.add_image(path)

    def reset(self) -> None:
        """Forget all messages and images, but not the system message."""
        from janus_modular.sequence import Message, Text

        self.messages = [] if self.system is None else [Message("system", [Text(self.system)])]
        self.images: list[Path] = []
        self.files: list[list[Path]] = [[] for _ in self.messages]  # images of each message

    def add_image(self, path: Path) -> None:
        """Add an image to the next message.

        Raises:
            ImageError: the image cannot be read.
        """
        from janus_modular.processing.image_io import open_image

        open_image(path)
        self.images.append(path)

    def ask(self, question: str) -> None:
        """Print the answer to a question; on any error or interrupt the conversation stays as it was."""
        from janus_modular.processing.image_io import open_image
        from janus_modular.sequence import ImageInput, Message, Text

        images = [ImageInput(open_image(path)) for path in self.images]
        messages = [*self.messages, Message("user", [*images, Text(question)])]
        drawn: list[Path] = []
        if self.reply_options is None:
            answer = print_answer(self.janus, messages, **self.settings)
            message = Message("assistant", [Text(answer)])
        else:
            drawing = {"first": self.drawings, **self.drawing_settings}
            options = {**self.reply_options, **self.settings}
            replies = self.janus.converse(messages, stream=True, drawing=drawing, **options)
            parts = write_reply(replies, encode=self.encode)
            drawn, message = [Path(part["image"]) for part in parts if "image" in part], replies.reply.message
            self.drawings += len(drawn)
        self.messages = [*messages, message]
        self.files += [self.images, drawn]
        self.images = []

    def draw(self, prompt: str) -> Path:
        """Draw an image into a new file; return its path. Each drawing has noise of its own.

        The text of the file says how it was drawn, as that of the command ``draw`` does.
        """
        from janus_modular.cli.draw import save_drawing

        settings: dict[str, Any] = {"first": self.drawings, **self.drawing_settings}
        [image] = self.janus.draw(prompt, 1, **settings)
        self.drawings += 1
        path = next_drawing()
        used = asdict(self.janus.image_settings(settings))
        save_drawing(image, path, prompt=prompt, n=1, model=self.model, options=self.options, settings=used)
        if self.encode:
            typer.echo(self.encode(image), nl=False)
        return path

    def change_setting(self, assignment: str) -> str:
        """Change a setting of the next answers, drawings, or both; return a line that says which.

        Raises:
            JanusError: this is not NAME=VALUE, no sampler has the setting, or its value is out of range.
        """
        try:
            [(name, value)] = collect_settings({}, [assignment]).items()
        except typer.BadParameter as error:
            raise JanusError(error.message.replace("--set", "/set", 1)) from error
        samplers: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
            "answers": (self.janus.text_settings, self.settings),
            "drawings": (self.janus.image_settings, self.drawing_settings),
        }
        known = {use: list(asdict(checked({}))) for use, (checked, _) in samplers.items()}
        uses = [use for use in samplers if name in known[use]]
        if not uses:
            listed = "; ".join(f"{use}: {', '.join(names)}" for use, names in known.items())
            raise JanusError(f"/set {name}: there is no such setting. Settings of {listed}")
        for use in uses:
            samplers[use][0]({name: value})
        for use in uses:
            samplers[use][1][name] = value
        return f"{name}={value} for {' and '.join(uses)}"

    def save(self, path: Path) -> None:
        """Write the conversation as one line in the data format of ``jsonl`` sources.

        Raises:
            JanusError: there is nothing to save, the file exists, or it cannot be written.
        """
        from janus_modular.atomic_writes import write_text

        if len(self.messages) < 2:
            raise JanusError("there is no conversation to save yet: ask something first.")
        if path.exists():
            raise JanusError(f"{path} exists already: name another file, or remove it.")
        record = {
            "messages": [
                {"role": message.role, "content": _parts(message, files)}
                for message, files in zip(self.messages, self.files, strict=True)
            ]
        }
        try:
            write_text(path, json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise JanusError(f"{path} could not be written: {error.strerror or error}") from error


def converse(conversation: Conversation) -> None:
    """Read questions and commands from the terminal until the user ends the conversation."""
    typer.echo(HELP, err=True)
    with line_editing():
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                typer.echo()
                return
            except KeyboardInterrupt:
                typer.echo()
                continue
            if line == "/quit":
                return
            try:
                _run(conversation, line)
            except KeyboardInterrupt:
                typer.echo("\n(stopped; the conversation is as before)", err=True)
            except JanusError as error:  # the conversation continues unchanged
                typer.echo(str(error), err=True)


def _run(conversation: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if not command.startswith("/"):
        if line:
            conversation.ask(line)
    elif command == "/reset":
        conversation.reset()
        typer.echo("reset: earlier messages and images are forgotten", err=True)
    elif command in ARGUMENTS:
        if not rest:
            raise JanusError(f"{command} needs {ARGUMENTS[command]} behind it.")
        if command == "/image":
            conversation.add_image(Path(rest).expanduser())
            typer.echo(f"added to the next message: {rest}", err=True)
        elif command == "/set":
            typer.echo(f"set: {conversation.change_setting(rest)}", err=True)
        elif command == "/save":
            conversation.save(Path(rest).expanduser())
            typer.echo(f"saved: {rest}", err=True)
        else:
            typer.echo(f"drawn: {conversation.draw(rest)}", err=True)
    else:
        typer.echo(HELP if command == "/help" else f"there is no command {command}.\n{HELP}", err=True)


def print_answer(janus: Janus, messages: list[Message], **settings: Any) -> Answer:
    """Print an answer while it is generated; return the whole answer."""
    started = False
    stream = janus.chat(messages, stream=True, **settings)
    for text in stream:
        text = text if started else text.lstrip()
        started = started or bool(text)
        typer.echo(text, nl=False)
    typer.echo()
    warn_if_cut(stream.answer)
    return stream.answer


def warn_if_cut(answer: Answer) -> None:
    """Print a note on stderr if an answer was cut, with the limit that cut it."""
    if not answer.was_cut:
        return
    usage = answer.usage
    limit = {
        "length": f"at max_tokens, {usage.completion_tokens}; raise --max-tokens for a longer answer",
        "context": f"where the model's context ends, {usage.total_tokens} positions; shorten the prompt",
    }[answer.finish_reason or ""]
    typer.echo(f"note: the answer was cut {limit}", err=True)


@contextmanager
def line_editing() -> Iterator[None]:
    """Edit lines with the arrow keys, and recall those of earlier conversations, in a terminal.

    Needs Python's module ``readline``, which Windows lacks; its own terminal edits lines.
    """
    try:
        import readline
    except ModuleNotFoundError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    file = history_file(os.environ)
    with suppress(OSError):  # the first conversation
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):  # a read-only home: only the history is lost
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def history_file(environment: Mapping[str, str]) -> Path:
    """Return the file of earlier lines, as the XDG base directory specification places it."""
    state = environment.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "janus-modular" / "chat_history"


def _parts(message: Message, files: list[Path]) -> Any:
    """Return a message's content as data has it: a text, or images and texts in their order."""
    from janus_modular.sequence import Text

    paths = iter(files)
    parts = [
        segment.text if isinstance(segment, Text) else {"image": str(next(paths).resolve())}
        for segment in message.content
    ]
    return parts if files else "".join(text for text in parts if isinstance(text, str))
