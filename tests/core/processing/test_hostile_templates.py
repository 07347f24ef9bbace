"""Chat templates that fail, loop, recurse or grow: each is stopped, and the next one is rendered."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_modular.errors import ConfigError, JanusError, PromptError
from janus_modular.processing import template_process
from janus_modular.processing.template_process import TemplateProcess
from janus_modular.processing.template_spans import render_conversation
from janus_modular.processing.templates import ChatTemplate
from janus_modular.sequence import Message, Text

CONTEXT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "add_generation_prompt": True}
LINES = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{% endfor %}<|end|>"
RENDERED = "<|user|>hello<|end|>"

FAILING = {
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "missing": "{{ nothing.at.all }}",
    "power": "{{ 'x' * 10 ** 11 }}",
    "filter": "{{ 'x' | center(10 ** 11) }}",
    "indent": "{{ messages | tojson(indent=10 ** 11) }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "lists": "{{ [0] * 10 ** 10 }}",
    "internals": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "own words": "{{ raise_exception('roles must alternate') }}",
    "output": f"{{{{ 'x' * {template_process.MAX_OUTPUT + 1} }}}}",
}
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "shared lists": (
        "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}"
        "{{ n.l == n.l | list | string }}"
    ),
    "words": "{{ lipsum(10 ** 9) }}",
}


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    template_process = TemplateProcess(seconds=0.3)
    yield template_process
    template_process.close()


@pytest.mark.parametrize("source", FAILING.values(), ids=FAILING)
def test_failing_template_is_an_error_and_the_next_one_renders(source: str, process: TemplateProcess) -> None:
    process.seconds = 20.0
    with pytest.raises(PromptError, match=r"the chat template refuses the conversation: .*roles were user"):
        process.render(source, CONTEXT)
    assert process.render(LINES, CONTEXT) == RENDERED


@pytest.mark.parametrize("character", ["\x1b[2J", "\x9b2J", "\a", "\u202e"])
def test_error_texts_of_templates_have_no_control_characters(
    character: str, process: TemplateProcess
) -> None:
    process.seconds = 20.0
    context = {"messages": [{"role": f"user{character}", "content": "a"}]}
    sources = [
        f"{{{{ raise_exception({character!r}) }}}}",
        f"{{% {character} %}}",
        f"{{{{ {{}}[{character!r}].a.b }}}}",
    ]
    for source in sources:
        with pytest.raises(JanusError) as caught:
            process.render(source, context)
        assert character[0] not in str(caught.value)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_endless_template_is_stopped_and_the_next_one_renders(source: str, process: TemplateProcess) -> None:
    process.seconds = 0.3
    with pytest.raises(PromptError, match=r"the chat template was stopped: it took more than 0\.3 s"):
        process.render(source, CONTEXT)
    process.seconds = 20.0
    assert process.render(LINES, CONTEXT) == RENDERED


@pytest.mark.parametrize("source", ["{% if x", "{{ " + "(" * 400 + ")" * 400 + " }}", "{% nothing %}"])
def test_invalid_template_is_an_error(source: str, process: TemplateProcess) -> None:
    process.seconds = 20.0
    with pytest.raises(ConfigError, match="the tokenizer's chat template"):
        process.render(source, CONTEXT)


def test_error_has_the_reason_that_the_template_raises() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(PromptError, match=r"conversation: roles must alternate\. The roles were user"):
        template([{"role": "user", "content": "hello"}], True)


def test_threads_get_their_own_renders(process: TemplateProcess) -> None:
    process.seconds = 20.0
    answers: dict[int, set[str]] = {i: set() for i in range(4)}

    def work(number: int) -> None:
        for _ in range(20):
            answers[number].add(process.render("{{ number }}", {"number": number}))

    threads = [threading.Thread(target=work, args=(i,)) for i in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: {str(i)} for i in answers}


def test_interrupted_render_is_not_returned_to_the_next_caller(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.seconds = 20.0
    process.render(LINES, CONTEXT)
    child = process._child
    assert child is not None
    assert child.stdout is not None

    class Interrupted:
        def __init__(self, pipe: Any) -> None:
            self.close = pipe.close

        def readline(self) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(child, "stdout", Interrupted(child.stdout))
    with pytest.raises(KeyboardInterrupt):
        process.render("{{ 'late' }}", CONTEXT)
    assert process.render(LINES, CONTEXT) == RENDERED


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_process_starts_its_own_child() -> None:
    program = (
        "import os\n"
        "from janus_modular.processing.template_process import TEMPLATES as t\n"
        "print(t.render('{{ 1 }}', {}), flush=True)\n"
        "if (pid := os.fork()) == 0:\n"
        "    print(t.render('{{ 2 }}', {}), flush=True)\n"
        "else:\n"
        "    os.waitpid(pid, 0)\n"
        "    print(t.render('{{ 3 }}', {}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1\n2\n3\n", "")


def test_rendering_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from janus_modular.processing.template_process import TEMPLATES as t, _answer\n"
        "print(t.render('{{ 1 }}', {}), _answer('{{ 2 }}', {}))\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1 ['rendered', '2']\n", "")


@given(data=st.data())
def test_random_edits_of_a_template_render_or_are_errors(
    mutations: ModuleType, process: TemplateProcess, data: st.DataObject
) -> None:
    process.seconds = 20.0
    source = data.draw(mutations.damaged_bytes(LINES.encode())).decode("utf-8", "surrogateescape")
    text = mutations.read_or_refused(lambda: process.render(source, CONTEXT), JanusError, "chat template")
    assert text is None or isinstance(text, str)


def test_a_template_that_is_stopped_is_not_rendered_again(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation is rendered several times: each would take as long."""
    process.seconds = 0.3
    monkeypatch.setattr(template_process, "TEMPLATES", process)
    requests: list[str] = []
    ask = process._ask
    monkeypatch.setattr(process, "_ask", lambda *words: requests.append("") or ask(*words))
    loops = "{% if '</think>' in messages[0].content %}{% endif %}" + ENDLESS["loops"]
    template = ChatTemplate(loops, {})
    with pytest.raises(PromptError, match="was stopped"):
        render_conversation(template, [Message("user", [Text("Hi")])], answer=True)
    assert len(requests) <= 2  # its analysis, and one render
