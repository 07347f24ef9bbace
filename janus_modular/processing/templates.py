"""How a conversation is written as one text: Janus', Janus-Pro's, the tokenizer's own, or none.

A template turns ``{"role", "content"}`` turns into text. It knows no images and no ids: an image is a
private mark within a content (see ``marking``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from janus_modular.errors import ConfigError, PromptError
from janus_modular.foreign import reason
from janus_modular.processing.template_spans import NONCE, Render, Turn

UNDERSTANDING_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)
"""The system text of the published models, for conversations that do not begin with a drawing."""


class Template(Render, Protocol):
    """What the processor asks of a template."""

    system: str  # the system text where the user gives none
    needs: tuple[str, ...]  # special tokens that the vocabulary must hold
    always_bos: bool  # put BOS first, whatever the tokenizer's own habit
    stop_strings: tuple[str, ...]  # an answer that comes to one of these is over


@dataclass
class JanusTemplate:
    """The published prompt: ``role: content``, a blank line after the user, EOS after the assistant."""

    user: str
    assistant: str
    eos: str
    needs: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    system: str = UNDERSTANDING_SYSTEM
    always_bos: bool = True
    searched: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    def __call__(self, turns: Sequence[Turn], answer: bool) -> str:
        """Write the turns; a message without content is ``role:``, which is how a prompt ends."""
        text = ""
        for i, turn in enumerate(turns):
            content = turn["content"].strip()
            if turn["role"] == "system" and i == 0:
                text += f"{content}\n\n" if content else ""
                continue
            role, end = {"user": (self.user, "\n\n"), "assistant": (self.assistant, self.eos)}.get(
                turn["role"], ("", "")
            )
            if not role:
                raise PromptError(
                    f"message {i} has the role '{turn['role']}'; the janus templates know user and "
                    "assistant, and system as the first message. Change the role."
                )
            text += f"{role}: {content}{end}" if content else f"{role}:"
        return (text + f"{self.assistant}:" if answer else text).strip()


@dataclass
class PlainTemplate:
    """No roles: what is asked on a line of its own, then the answer and EOS."""

    eos: str
    system: str = ""
    needs: tuple[str, ...] = ()
    always_bos: bool = False
    stop_strings: tuple[str, ...] = ()
    searched: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    def __call__(self, turns: Sequence[Turn], answer: bool) -> str:
        """Write each turn as it is, ended by EOS if it is the assistant's and by a line break if not."""
        return "".join(
            turn["content"].strip() + (self.eos if turn["role"] == "assistant" else "\n") for turn in turns
        )


@dataclass
class ChatTemplate:
    """The tokenizer's own chat template: a jinja program, run in a sandbox and with limits.

    The helpers are those that such templates are written against: special tokens by name,
    ``raise_exception``, ``strftime_now``, ``tojson``, ``break`` and ``continue`` in loops. Content is a text,
    or a list of parts where the template renders nothing else (Idefics3's and LLaVA-NeXT's); images have
    their marks in the text either way.
    """

    source: str
    tokens: dict[str, str]  # bos_token, eos_token, ... as the tokenizer names them
    variables: Mapping[str, Any] = field(default_factory=dict)  # enable_thinking, ... as the config sets them
    system: str = ""
    needs: tuple[str, ...] = ()
    always_bos: bool = False
    stop_strings: tuple[str, ...] = ()

    def __call__(self, turns: Sequence[Turn], answer: bool) -> str:
        """Run the program.

        Raises:
            PromptError: it refuses the conversation, fails, or exceeds a limit.
        """
        return self._run(turns, answer, self._roles_with_parts)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the variables that can be set for it."""
        own = {"messages", "add_generation_prompt", *self.tokens, "bos_token", "eos_token", "pad_token"}
        return tuple(name for name in self._facts["variables"] if name not in own)

    @property
    def searched(self) -> tuple[str, ...]:
        """Strings that it looks for in what was said: reasoning tags, say."""
        return tuple(self._facts["searched"])

    def _run(self, turns: Sequence[Turn], answer: bool, with_parts: frozenset[str]) -> str:
        from janus_modular.processing.template_process import TEMPLATES

        messages = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if turn["role"] in with_parts
            else turn
            for turn in turns
        ]
        context = {"tools": None, "documents": None, **self.variables, **self.tokens}
        return TEMPLATES.render(
            self.source, {**context, "messages": messages, "add_generation_prompt": answer}
        )

    @cached_property
    def _facts(self) -> dict[str, list[str]]:
        from janus_modular.processing.template_process import TEMPLATES

        return TEMPLATES.analyse(self.source)

    @cached_property
    def _roles_with_parts(self) -> frozenset[str]:
        """The roles whose content is rendered as a list of parts alone; a text is lost, or refused."""
        probe = f"p{NONCE}p"
        found: frozenset[str] = frozenset()
        user, assistant, system = ({"role": r, "content": probe} for r in ("user", "assistant", "system"))
        for role, turns in {"user": [user], "assistant": [user, assistant], "system": [system, user]}.items():
            if not self._keeps(probe, turns, found) and self._keeps(probe, turns, found | {role}):
                found |= {role}
        return found

    def _keeps(self, probe: str, turns: Sequence[Turn], with_parts: frozenset[str]) -> bool:
        try:
            return self._run(turns, False, with_parts).count(probe) == len(turns)
        except PromptError:
            return False


TEMPLATES = ("janus", "janus-pro", "chat", "plain")


def make_template(
    name: str,
    *,
    eos: str,
    tokens: dict[str, str],
    chat_template: str | None,
    variables: Mapping[str, Any] | None = None,
) -> Template:
    """Return the template called ``name``, with values for the variables that it reads.

    Raises:
        ConfigError: there is none of that name, the tokenizer brings no chat template, or the template never
            reads one of the variables, or JSON cannot hold one of their values.
    """
    try:
        json.dumps(variables or {}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"processor.template_variables: {reason(error)}. Expected texts, finite numbers, true, false,"
            " null, and lists and mappings of them."
        ) from error
    template = _template(name, eos=eos, tokens=tokens, chat_template=chat_template, variables=variables or {})
    if variables and (unknown := [key for key in variables if key not in template.reads]):
        raise ConfigError(
            f"processor.template_variables: the template '{name}' never reads {', '.join(unknown)}. It reads"
            f" {', '.join(template.reads) or 'no variables'}."
        )
    return template


def _template(
    name: str,
    *,
    eos: str,
    tokens: dict[str, str],
    chat_template: str | None,
    variables: Mapping[str, Any],
) -> Template:
    if name == "janus":
        return JanusTemplate("User", "Assistant", eos, stop_strings=("User:",))
    if name == "janus-pro":
        user, assistant = "<|User|>", "<|Assistant|>"
        return JanusTemplate(user, assistant, eos, needs=(user, assistant), stop_strings=(user,))
    if name == "plain":
        return PlainTemplate(eos)
    if name != "chat":
        raise ConfigError(
            f"processor.template: there is no template '{name}'. Available: {', '.join(TEMPLATES)}."
        )
    if not chat_template:
        raise ConfigError(
            "processor.template: 'chat' is the tokenizer's own chat template, and this tokenizer has none "
            "(neither chat_template.jinja nor chat_template in tokenizer_config.json). "
            "Add one, or choose janus, janus-pro or plain."
        )
    return ChatTemplate(chat_template, tokens, variables)
