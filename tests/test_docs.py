"""Documented commands parse, examples run, links and files exist.

``<!-- serve -->`` above a command starts a server, and later blocks of the page use its address.
``<!-- run -->`` above a block of Python or of ``janus-modular`` commands in a page makes this module run the
block in a folder with a tiny checkpoint at runs/demo/model, images and a data set; ``<!-- file: NAME -->``
writes a block into that folder as a file.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.config.presets import shipped
from janus_modular.plugins import Plugins, set_default_plugins

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>run|serve|file: \S+) -->\n)?"
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
SHELL = ("bash", "sh", "console")
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    body: str
    mark: str  # "", "run", "serve" or "file: NAME"
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(
            match["language"],
            match["body"],
            match["mark"] or "",
            text.count("\n", 0, match.start("body")) + 1,
        )
        for match in BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return BLOCK.sub("", page.read_text("utf-8"))


def commands(shell: str) -> Iterator[list[str]]:
    """Yield the arguments of each ``janus-modular`` command in lines of shell."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&|>")
        lexer.whitespace_split = True
        arguments: list[str] = []
        for argument in [*lexer, ";"]:
            if set(argument) <= set(";&|>"):
                while arguments and re.fullmatch(r"[A-Z_]+=.*", arguments[0]):  # environment variables
                    arguments.pop(0)
                if arguments and Path(arguments[0]).name == "janus-modular":
                    yield arguments[1:]
                arguments = []
            else:
                arguments.append(argument)


def documented_commands() -> Iterator[Any]:
    """Yield the arguments of every command in pages and in opening comments of shipped configs."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in blocks(page):
            if block.language in SHELL:
                for arguments in commands(block.body):
                    yield pytest.param(arguments, id=f"{name}: {shlex.join(arguments)}")
        for inline in re.findall(r"`(janus-modular [^`]+)`", prose(page)):
            yield pytest.param(shlex.split(inline)[1:], id=f"{name}: {inline}")
    for config in sorted((ROOT / "configs").rglob("*.yaml")):
        for comment in re.findall(r"^# +((?:[A-Z_]+=\S+ )?janus-modular .*)$", opening(config), re.MULTILINE):
            for arguments in commands(comment.replace("...", "x")):
                yield pytest.param(arguments, id=f"{config.relative_to(ROOT).as_posix()}: {comment}")


def all_commands() -> dict[str, Any]:
    """Return every command by its words on the line (``config show``)."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)

    def inside(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "list_commands"):
            yield words, command
            return
        for name in command.list_commands(context):
            yield from inside(command.get_command(context, name), f"{words} {name}".strip())

    return dict(inside(group, ""))


def opening(config: Path) -> str:
    """Return the comment that a YAML file opens with."""
    lines = config.read_text("utf-8").splitlines()
    return "\n".join(
        lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    )


@pytest.fixture
def parse() -> Callable[[list[str]], None]:
    """Return a function that parses arguments with the real command line without running the command."""
    group: Any = typer.main.get_command(app)
    find = group.get_command

    def disabled(command: Any) -> Any:
        if command is not None:
            command.callback = lambda **_: None
            for inner in getattr(command, "commands", {}).values():
                disabled(inner)
        return command

    disabled(group)
    group.get_command = lambda context, name: disabled(find(context, name))  # also external commands
    return lambda arguments: group.main(arguments, prog_name="janus-modular", standalone_mode=False)


@pytest.mark.parametrize("arguments", list(documented_commands()))
def test_documented_commands_parse(arguments: list[str], parse: Callable[[list[str]], None]):
    parse(arguments)


@pytest.mark.parametrize(("words", "command"), all_commands().items())
def test_the_help_of_every_command_ends_in_an_example_that_parses(
    words: str, command: Any, parse: Callable[[list[str]], None]
):
    *_, last = command.help.splitlines()
    assert last.startswith(f"Example: janus-modular {words}")
    parse(shlex.split(last)[2:])


@pytest.mark.parametrize("words", ["draw", "plugins check", "bundle prune", "demo run", ""])
def test_the_help_shows_no_type_of_flags(words: str):
    shown = CliRunner().invoke(app, [*words.split(), "--help"], terminal_width=120).output
    assert "Show this message and exit." in shown
    assert "<bool>" not in shown


@pytest.mark.parametrize(
    "config",
    sorted((ROOT / "configs").rglob("*.yaml")),
    ids=lambda config: config.relative_to(ROOT).as_posix(),
)
def test_shipped_configs_begin_with_a_description_and_a_command(config: Path):
    first, *others = opening(config).splitlines()
    assert len(first) > 20
    assert any("janus-modular " in line for line in others)


@EACH_PAGE
def test_python_blocks_compile(page: Path):
    for block in blocks(page):
        if block.language == "python":
            compile(block.body, f"{page.name}:{block.line}", "exec")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that examples run in, with a tiny checkpoint, images and a data set."""
    import torch
    from PIL import Image

    from janus_modular.checkpoints import ModelAssembly, save
    from janus_modular.config import load, resolve
    from janus_modular.config.schema import ModelConfig

    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    (folder / "runs/demo").mkdir(parents=True)
    config = load("tiny", ["processor.template=plain"])  # as the demo's model has it
    save(ModelAssembly.from_config(resolve(config, ModelConfig)), folder / "runs/demo/model")
    for name, color in {"runs/demo/example.png": "white", "cat.png": "orange", "dog.png": "brown"}.items():
        Image.new("RGB", (40, 30), color).save(folder / name)
    (folder / "data").mkdir()
    shutil.copy(folder / "cat.png", folder / "data/cat.png")
    lines = [{"image": "cat.png", "caption": "a cat"}, {"image": "cat.png", "caption": "an orange cat"}]
    (folder / "data/pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data/text.jsonl").write_text('{"text": "Cats purr."}\n')
    return folder


def pages_that_run() -> Iterator[Any]:
    """Yield the pages with marked blocks; those that export a model are slow, but for the README."""
    for page in PAGES:
        if any(block.mark for block in blocks(page)):
            exports = "janus-modular export" in page.read_text("utf-8") and page.name != "README.md"
            marks = [pytest.mark.slow] if exports else []
            yield pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=marks)


SERVED = "http://127.0.0.1:8000"
"""Where pages say that a server answers."""


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the command ``serve`` return at once, with a server in a thread; return the servers' addresses."""
    from janus_modular.server import run

    with ExitStack() as stack:
        started: list[str] = []

        def serve(service: Any, on_start: Callable[[str], None]) -> None:
            listener = stack.enter_context(run.listen("127.0.0.1", 0))
            server = run.make_server(service)
            thread = Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            started.append(run.address_of(listener))

        monkeypatch.setattr(run, "serve", serve)
        yield started


@pytest.mark.parametrize("page", list(pages_that_run()))
def test_marked_blocks_run(
    page: Path,
    workshop: Path,
    plugins: Plugins,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    addresses: list[str],
):
    folder = tmp_path / "workshop"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.mark.startswith("file: "):
            file = folder / block.mark.removeprefix("file: ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.body, "utf-8")
        elif block.mark and block.language == "python":
            set_default_plugins(Plugins(plugins.entry_points))
            body = block.body.replace(SERVED, addresses[-1]) if addresses else block.body
            exec(compile(body, where, "exec"), names)
        elif block.mark:
            for arguments in commands(block.body):
                set_default_plugins(Plugins(plugins.entry_points))
                assert exit_code(arguments) == 0, f"{where}: {shlex.join(arguments)}"


def exit_code(arguments: list[str]) -> int:
    """Run a command in this process and return its exit code."""
    try:
        return (
            typer.main.get_command(app).main(arguments, prog_name="janus-modular", standalone_mode=False) or 0
        )
    except typer.Exit as stop:
        return stop.exit_code


@EACH_PAGE
def test_link_targets_exist(page: Path):
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: no such heading"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@EACH_PAGE
def test_named_files_exist(page: Path):
    tops = "janus_modular|plugins|export|configs|tests|docs|bench"
    for name in re.findall(rf"`((?:{tops})/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists() or name in shipped(), name
