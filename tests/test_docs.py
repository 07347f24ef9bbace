"""Documented commands parse, and examples run.

Each block of a page that could run has a mark above it:

- ``<!-- run -->``: this module runs the Python, or the ``janus-modular`` commands, in a folder with a tiny
  checkpoint at runs/demo/model, others as published, images and a data set;
- ``<!-- run slow -->``: the same, in the slow tests;
- ``<!-- serve -->``: the command starts a server, and later blocks of the page use its address;
- ``<!-- file: NAME -->``: the block is written into that folder as a file;
- ``<!-- not run: REASON -->``: nothing runs it here. The reason begins with one of `REASONS`, and may name
  the test that covers the block.

Blocks of JSON, TOML and YAML are parsed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.plugins import Plugins, set_default_plugins

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?"
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
SHELL = ("bash", "sh", "console")
PROGRAMS = (*SHELL, "python", "javascript")
REASONS = (
    "needs the hub", "needs a GPU", "needs several GPUs", "needs a cluster", "needs your data and weights",
    "needs onnxruntime-node", "installs packages", "measures for minutes", "minutes", "the tests themselves",
    "the environment of the tests", "a fragment of a component", "a fragment of a plugin",
    "registers a check",
)  # fmt: skip
"""Why a block may not be run by this module."""
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    body: str
    mark: str  # "", "run", "run slow", "serve", "file: NAME" or "not run: REASON"
    line: int

    @property
    def is_run(self) -> bool:
        """Return True if this module runs the block, or writes it into a file."""
        return self.mark in ("run", "run slow", "serve") or self.mark.startswith("file: ")


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


@EACH_PAGE
def test_each_block_runs_or_says_why_it_does_not(page: Path):
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.language not in PROGRAMS:
            continue
        assert block.is_run or block.mark.startswith("not run: "), f"{where}: no mark above the block"
        if not block.is_run:
            reason = block.mark.removeprefix("not run: ")
            assert reason.startswith(REASONS), f"{where}: {reason}"
            for name in re.findall(r"tests/\S+\.py", reason):
                assert (ROOT / name).is_file(), f"{where}: {name}"


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("```bash\nls\n```\n", ""),
        ("<!-- run -->\n```bash\nls\n```\n", "run"),
        ("<!-- not run: needs a GPU -->\n\n```bash\nls\n```\n", ""),  # not directly above
        ("<!-- not run: needs a GPU -->\n```bash\nls\n```\n", "not run: needs a GPU"),
    ],
)
def test_a_mark_is_directly_above_its_block(text: str, mark: str, tmp_path: Path):
    (tmp_path / "page.md").write_text(text)
    [block] = blocks(tmp_path / "page.md")
    assert (block.mark, block.language) == (mark, "bash")


@EACH_PAGE
def test_blocks_of_data_parse(page: Path):
    read = {"json": read_json, "toml": tomllib.loads, "yaml": yaml.safe_load}
    for block in blocks(page):
        if block.language in read and not block.body.startswith("--8<--"):  # another file, put in by mkdocs
            read[block.language](block.body)


def read_json(text: str) -> Any:
    """Read JSON, or JSON Lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@EACH_PAGE
def test_documented_targets_of_make_exist(page: Path):
    inline = re.findall(r"`make ([a-z -]+)`", prose(page))
    in_blocks = [
        match
        for block in blocks(page)
        if block.language in SHELL
        for match in re.findall(r"^make ([a-z -]+)", block.body, re.MULTILINE)
    ]
    for targets in [*inline, *in_blocks]:
        assert set(targets.split()) <= make_targets(), targets


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


SLOW_PAGES = [f"docs/how-to/{name}.md" for name in ("from-published-code", "from-transformers", "swap-parts")]
"""Pages that open a checkpoint of the published sizes, or train several times: 8 s each."""


def pages_that_run() -> Iterator[Any]:
    """Yield the pages with blocks that run, with the marks of these blocks.

    Pages that export a model are slow, and those of `SLOW_PAGES`; so are blocks that say so.
    """
    for page in PAGES:
        marks = {block.mark for block in blocks(page) if block.is_run}
        exports = any("janus-modular export" in block.body for block in blocks(page) if block.is_run)
        name = page.relative_to(ROOT).as_posix()
        if exports or name in SLOW_PAGES:
            yield pytest.param(page, ("run", "run slow"), id=name, marks=pytest.mark.slow)
            continue
        if marks - {"run slow"}:
            yield pytest.param(page, ("run",), id=name)
        if "run slow" in marks:
            yield pytest.param(page, ("run", "run slow"), id=f"{name}, slow", marks=pytest.mark.slow)


SERVED = "http://127.0.0.1:8000"
"""Where pages say that a server answers."""


@pytest.mark.parametrize(("page", "marks"), list(pages_that_run()))
def test_marked_blocks_run(
    page: Path,
    marks: tuple[str, ...],
    workshop: Path,
    plugins: Plugins,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    addresses: list[str],
):
    folder = tmp_path / "workshop"
    shutil.copytree(workshop, folder)
    if any("models/Janus-Pro-1B" in block.body for block in blocks(page) if block.is_run):
        write_published(folder / "models")
    run_blocks(page, marks, folder, plugins, monkeypatch, addresses)


@pytest.mark.slow
def test_readme_runs_after_a_demo_alone(
    plugins: Plugins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, addresses: list[str]
):
    """Nothing is prepared but by the demo, in a few steps."""
    monkeypatch.chdir(tmp_path)
    stages = ("tokenizer", "encoder", "words", "stage1", "stage2", "stage3")
    phases = ("classifier", *(f"stages.{name}" for name in stages))
    few = [f"{name}.schedule.steps=25" for name in phases]
    continuous = "model.generation.tokenizer.continuous_steps=1"
    assert exit_code(["demo", "--quiet", "count=20", continuous, "post_training_steps=[]", *few]) == 0
    run_blocks(ROOT / "README.md", ("run", "run slow"), tmp_path, plugins, monkeypatch, addresses)


def write_published(folder: Path) -> None:
    """Write small checkpoints with random weights, in the published format and in that of transformers."""
    from safetensors.numpy import save_file

    reference, published = ROOT / "tests/fixtures/reference", folder / "Janus-Pro-1B"
    published.mkdir(parents=True)
    for file in reference.glob("*.json"):
        shutil.copy(file, published)
    names: dict[str, Any] = {}
    exec((reference / "deterministic_weights.py").read_text("utf-8"), names)
    shapes = json.loads((reference / "keys.json").read_text("utf-8"))
    weights = {key: names["tensor_for"](key, tuple(shape)) for key, shape in shapes.items()}
    save_file(weights, published / "model.safetensors")
    other = folder / "Janus-Pro-1B-hf"
    assert exit_code(["convert", str(published), str(other), "--format", "transformers"]) == 0


def run_blocks(
    page: Path,
    marks: tuple[str, ...],
    folder: Path,
    plugins: Plugins,
    monkeypatch: pytest.MonkeyPatch,
    addresses: list[str],
) -> None:
    """Run the blocks of a page that have one of the marks in a folder, and write its files there."""
    monkeypatch.chdir(folder)
    (folder / "plugins").symlink_to(ROOT / "plugins")  # which pages name from a checkout
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.mark.startswith("file: "):
            file = folder / block.mark.removeprefix("file: ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.body, "utf-8")
        elif block.mark in marks and block.language == "python":
            set_default_plugins(Plugins(plugins.entry_points))
            body = block.body.replace(SERVED, addresses[-1]) if addresses else block.body
            exec(compile(body, where, "exec"), names)
        elif block.mark in (*marks, "serve"):
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
