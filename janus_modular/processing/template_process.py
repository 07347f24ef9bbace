"""Rendering chat templates in a child process, with limits on time, memory and output.

A chat template is a program that came with a tokenizer. jinja's sandbox keeps it from files and from Python's
internals, but not from looping, recursing or growing for ever, and no list of dangerous operators is complete
(``x * n``, ``x ~ x``, a list that holds itself twice, ``|center``, ...). So the operating system sets the
limits. One child process, started at the first template, renders all templates until the program ends. A
template that exceeds a limit ends the child, and the next render starts a new one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any

from janus_modular.errors import ConfigError, JanusError, PromptError
from janus_modular.foreign import printable, reason

SECONDS = 2.0
"""Longest processor time for one render, so that a busy machine makes no difference; published templates
take about a millisecond. A conversation is rendered several times."""

MAX_MEMORY = 2**29
"""Address space of the child in bytes, Python included; not limited on Windows and macOS."""

MAX_OUTPUT = 16 * 2**20
"""Most characters of a rendered conversation."""


class TemplateStoppedError(PromptError):
    """A chat template was stopped, because it took too long or crashed: rendering again would not help."""


class TemplateProcess:
    """A child process that renders chat templates, one at a time; started at the first render."""

    def __init__(self, *, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0  # the process that started the child: after a fork its pipes belong to another

    def render(self, source: str, context: Mapping[str, Any]) -> str:
        """Return the text of the template ``source``, rendered with ``context``, which must be JSON.

        Raises:
            ConfigError: the source is no valid template.
            PromptError: the template refuses the conversation, or exceeds a limit.
        """
        outcome, text = self._ask(source, context)
        if outcome == "refused":
            roles = ", ".join(str(turn.get("role")) for turn in context.get("messages", ())) or "(none)"
            raise PromptError(
                f"the chat template refuses the conversation: {printable(text, most=2000)}. The roles were"
                f" {printable(roles)}."
            )
        return str(text)

    def analyse(self, source: str) -> dict[str, list[str]]:
        """Return the ``variables`` of a template, and the ``search_strings`` that it looks for in texts.

        Raises:
            ConfigError: the source is no valid template.
            PromptError: reading the source exceeds a limit.
        """
        _, text = self._ask(source, None)
        facts: dict[str, list[str]] = json.loads(text)
        return facts

    def _ask(self, source: str, context: Mapping[str, Any] | None) -> list[str]:
        request = json.dumps([source, context, self.seconds])
        with self._lock:
            answer = self._exchange(request)
        if not answer:
            raise TemplateStoppedError(
                f"the chat template was stopped: it took more than {self.seconds:g} s of processor time or"
                " crashed its process. Expected a template that ends; choose another processor.template."
            )
        outcome, text = json.loads(answer)
        if outcome == "invalid":
            raise ConfigError(printable(text, most=2000))
        return [outcome, text]

    def close(self) -> None:
        """End the child, if there is one; the next render starts a new child."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe:
                pipe.close()
        child.wait()

    def _exchange(self, request: str) -> str:
        """Send a line and return the child's answer; "" if the child ended instead."""
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self.close()
            self._child, self._owner = self._start(), os.getpid()
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        answer = ""
        try:
            stdin.write(f"{request}\n")
            stdin.flush()
            answer = stdout.readline()
        except (BrokenPipeError, ConnectionError):
            pass
        finally:
            if not answer.endswith(
                "\n"
            ):  # also after an interrupt: a late answer must not be read as the next one
                self.close()
                answer = ""
        return answer

    def _start(self) -> subprocess.Popen[str]:
        # By the parent's own search path, never that of the working directory.
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
            )
        except OSError as error:
            raise PromptError(
                f"a chat template runs in a process of its own, which did not start: {reason(error)}."
                " Choose another processor.template, or allow this program to start processes."
            ) from error


TEMPLATES = TemplateProcess()
"""The child process that renders all templates of this program."""

atexit.register(TEMPLATES.close)


def serve() -> None:
    """Render the requests on standard input, one a line, until the input ends: the child's program."""
    import signal

    answers, sys.stdout = sys.stdout, sys.stderr  # only answers go to the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _limit_memory()
    for line in sys.stdin:
        source, context, seconds = json.loads(line)
        with _time_limit(seconds):
            answer = _answer(source, context)
        _send(answers, answer)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End this process, even inside a library, after so much processor time (on Windows: time)."""
    import faulthandler
    import signal

    if hasattr(signal, "setitimer"):  # the default action of SIGPROF ends the process
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        return
    with open(os.devnull, "w") as null:
        faulthandler.dump_traceback_later(seconds, exit=True, file=null)
        yield
        faulthandler.cancel_dump_traceback_later()


def _answer(source: str, context: dict[str, Any] | None) -> list[str]:
    """Return ``[outcome, text]`` of a render, or of an analysis if there is no context.

    The outcome is rendered, refused or invalid.
    """
    import jinja2

    try:
        template = _compiled(source)
    except JanusError as error:
        return ["invalid", str(error)]
    except Exception as error:  # nested too deeply for a compiler, for example
        return ["invalid", f"the tokenizer's chat template cannot be compiled: {reason(error)}."]
    if context is None:
        from janus_modular.processing.jinja_templates import analyse_template

        return ["rendered", json.dumps(analyse_template(template.environment, source))]
    try:
        text = template.render(context)
    except jinja2.TemplateError as error:  # the message is mostly the template's own
        return ["refused", str(error)]
    except Exception as error:  # a template may fail in any way that Python can
        return ["refused", reason(error)]
    if len(text) > MAX_OUTPUT:
        return ["refused", f"it wrote {len(text):,} characters; at most {MAX_OUTPUT:,} are allowed"]
    return ["rendered", text]


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    from janus_modular.processing.jinja_templates import compile_template

    return compile_template(source)


def _send(answers: IO[str], answer: list[str]) -> None:
    try:
        line = json.dumps(answer)
    except MemoryError as error:
        line = json.dumps(["refused", reason(error)])
    answers.write(f"{line}\n")
    answers.flush()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except (ImportError, ValueError, OSError):  # no such limit on this system; the limit on time remains
        pass
