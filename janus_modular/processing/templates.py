"""Templates, which write a conversation as text: Janus', Janus-Pro's, the tokenizer's own, or plain.

A template gets turns of ``{"role", "content"}``. It knows neither images nor ids: an image is a private
sentinel in the content (see ``template_spans``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from janus_modular.errors import ConfigError, PromptError
from janus_modular.foreign import reason
from janus_modular.processing.template_process import TemplateStoppedError
from janus_modular.processing.template_spans import NONCE, Render, Turn

UNDERSTANDING_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)
"""The system text of the published models, for conversations that do not begin with a drawing."""


class Template(Render, Protocol):
    """The interface of templates to the processor."""

    system: str  # the system text of conversations without one
    required_tokens: tuple[str, ...]  # special tokens that the vocabulary must hold
    always_bos: bool  # begin with BOS, even if the tokenizer does not add it
    stop_strings: tuple[str, ...]  # an answer ends before any of these


@dataclass
class JanusTemplate:
    """The published prompt: ``role: content``, a blank line after the user, EOS after the assistant."""

    user: str
    assistant: str
    eos: str
    required_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    system: str = UNDERSTANDING_SYSTEM
    always_bos: bool = True
    search_strings: tuple[str, ...] = ()
    variable_names: tuple[str, ...] = ()

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
                    f"a message has the role '{turn['role']}'; the janus templates know user and assistant,"
                    " and system as the first message. Change the role."
                )
            text += f"{role}: {content}{end}" if content else f"{role}:"
        return (text + f"{self.assistant}:" if answer else text).strip()


@dataclass
class PlainTemplate:
    """No roles: the user's content on a line of its own, then the answer and EOS."""

    eos: str
    system: str = ""
    required_tokens: tuple[str, ...] = ()
    always_bos: bool = False
    stop_strings: tuple[str, ...] = ()
    search_strings: tuple[str, ...] = ()
    variable_names: tuple[str, ...] = ()

    def __call__(self, turns: Sequence[Turn], answer: bool) -> str:
        """Write each turn as it is, ended by EOS if it is the assistant's and by a line break if not."""
        return "".join(
            turn["content"].strip() + (self.eos if turn["role"] == "assistant" else "\n") for turn in turns
        )


@dataclass
class ChatTemplate:
    """The tokenizer's own chat template: a jinja program, run in a sandbox and with limits.

    It gets the usual helpers of chat templates: special tokens by name,
    ``raise_exception``, ``strftime_now``, ``tojson``, ``break`` and ``continue`` in loops. Content is a text,
    or a list of parts where the template renders only lists (Idefics3's and LLaVA-NeXT's); images have
    their sentinels in the text either way.
    """

    source: str
    tokens: dict[str, str]  # bos_token, eos_token, ... as the tokenizer names them
    variables: Mapping[str, Any] = field(default_factory=dict)  # enable_thinking, ... as the config sets them
    system: str = ""
    required_tokens: tuple[str, ...] = ()
    always_bos: bool = False
    stop_strings: tuple[str, ...] = ()

    def __call__(self, turns: Sequence[Turn], answer: bool) -> str:
        """Run the program.

        Raises:
            PromptError: the template refuses the conversation, fails, or exceeds a limit.
        """
        return self._run(turns, answer, self._roles_with_parts)

    @property
    def variable_names(self) -> tuple[str, ...]:
        """Names of the variables that can be set for the template."""
        own = {"messages", "add_generation_prompt", *self.tokens, "bos_token", "eos_token", "pad_token"}
        return tuple(name for name in self._facts["variables"] if name not in own)

    @property
    def search_strings(self) -> tuple[str, ...]:
        """Strings for which the template searches the content of messages."""
        return tuple(self._facts["search_strings"])

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
        """The roles whose content is rendered only as a list of parts: a text is lost, or refused."""
        probe = f"p{NONCE}p"
        roles: frozenset[str] = frozenset()
        user, assistant, system = ({"role": r, "content": probe} for r in ("user", "assistant", "system"))
        for role, turns in {"user": [user], "assistant": [user, assistant], "system": [system, user]}.items():
            if not self._keeps(probe, turns, roles) and self._keeps(probe, turns, roles | {role}):
                roles |= {role}
        return roles

    def _keeps(self, probe: str, turns: Sequence[Turn], with_parts: frozenset[str]) -> bool:
        try:
            text = self._run(turns, False, with_parts)
        except TemplateStoppedError:
            raise
        except PromptError:
            return False
        # Jinja writes a list that a template takes for a text as Python does.
        return text.count(probe) == len(turns) and "'type': 'text'" not in text


TEMPLATES = ("janus", "janus-pro", "chat", "plain")


def make_template(
    name: str,
    *,
    eos: str,
    tokens: dict[str, str],
    chat_template: str | None,
    variables: Mapping[str, Any] | None = None,
) -> Template:
    """Return the template called ``name``, with values for its variables.

    Raises:
        ConfigError: there is no such template, the tokenizer has no chat template, the template never reads
            a variable, or JSON cannot hold a variable's value.
    """
    try:
        json.dumps(variables or {}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"processor.template_variables: {reason(error)}. Expected texts, finite numbers, true, false,"
            " null, and lists and mappings of them."
        ) from error
    template = _template(name, eos=eos, tokens=tokens, chat_template=chat_template, variables=variables or {})
    if variables and (unknown := [key for key in variables if key not in template.variable_names]):
        raise ConfigError(
            f"processor.template_variables: the template '{name}' never reads {', '.join(unknown)}. It reads"
            f" {', '.join(template.variable_names) or 'no variables'}."
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
        return JanusTemplate(user, assistant, eos, required_tokens=(user, assistant), stop_strings=(user,))
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
