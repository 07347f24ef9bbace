"""What we tell people to type works: commands parse, examples run, links and files are there.

In a page, ``<!-- run -->`` above a block of Python or of ``janus-modular`` commands has it run here, in a
folder with a tiny checkpoint at runs/demo/model, images and a data set; ``<!-- file: NAME -->`` puts a
block into that folder as a file.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

from janus_modular.cli.app import app
from janus_modular.config.presets import shipped
from janus_modular.plugins import Plugins, set_default_plugins

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>run|file: \S+) -->\n)?"
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
SHELL = ("bash", "sh", "console")
OF_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    body: str
    mark: str  # "", "run" or "file: NAME"
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(
            found["language"],
            found["body"],
            found["mark"] or "",
            text.count("\n", 0, found.start("body")) + 1,
        )
        for found in BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return BLOCK.sub("", page.read_text("utf-8"))


def commands(shell: str) -> Iterator[list[str]]:
    """Yield the arguments of each ``janus-modular`` in lines of shell."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&|>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|>"):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # settings of the environment
                    words.pop(0)
                if words and Path(words[0]).name == "janus-modular":
                    yield words[1:]
                words = []
            else:
                words.append(word)


def told() -> Iterator[Any]:
    """Yield every command that pages and shipped configs tell people to type."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in blocks(page):
            if block.language in SHELL:
                for words in commands(block.body):
                    yield pytest.param(words, id=f"{name}: {shlex.join(words)}")
        for inline in re.findall(r"`(janus-modular [^`]+)`", prose(page)):
            yield pytest.param(shlex.split(inline)[1:], id=f"{name}: {inline}")
    for config in sorted((ROOT / "configs").rglob("*.yaml")):
        for comment in re.findall(r"^# +((?:[A-Z_]+=\S+ )?janus-modular .*)$", opening(config), re.MULTILINE):
            for words in commands(comment.replace("...", "x")):
                yield pytest.param(words, id=f"{config.relative_to(ROOT).as_posix()}: {comment}")


def opening(config: Path) -> str:
    """Return the comment that a YAML file opens with."""
    lines = config.read_text("utf-8").splitlines()
    return "\n".join(
        lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    )


@pytest.fixture
def parse() -> Callable[[list[str]], None]:
    """Parse arguments with the real command line, whose commands do nothing."""
    group: Any = typer.main.get_command(app)
    find = group.get_command

    def silent(command: Any) -> Any:
        if command is not None:
            command.callback = lambda **_: None
            for inner in getattr(command, "commands", {}).values():
                silent(inner)
        return command

    silent(group)
    group.get_command = lambda context, name: silent(find(context, name))  # those that packages bring, too
    return lambda words: group.main(words, prog_name="janus-modular", standalone_mode=False)


@pytest.mark.parametrize("words", list(told()))
def test_every_command_that_we_tell_people_parses(words: list[str], parse: Callable[[list[str]], None]):
    parse(words)


@pytest.mark.parametrize(
    "config",
    sorted((ROOT / "configs").rglob("*.yaml")),
    ids=lambda config: config.relative_to(ROOT).as_posix(),
)
def test_a_shipped_config_opens_with_what_it_is_and_the_command_that_runs_it(config: Path):
    first, *others = opening(config).splitlines()
    assert len(first) > 20
    assert any("janus-modular " in line for line in others)


@OF_PAGES
def test_python_in_a_page_compiles(page: Path):
    for block in blocks(page):
        if block.language == "python":
            compile(block.body, f"{page.name}:{block.line}", "exec")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder that examples run in: a tiny checkpoint, images, a data set."""
    import torch
    from PIL import Image

    from janus_modular.checkpoints import ModelAssembly, save
    from janus_modular.config import load, resolve
    from janus_modular.config.schema import ModelConfig

    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    (folder / "runs/demo").mkdir(parents=True)
    save(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)), folder / "runs/demo/model")
    for name, color in {"digit.png": "white", "cat.png": "orange", "dog.png": "brown"}.items():
        Image.new("RGB", (40, 30), color).save(folder / name)
    (folder / "data").mkdir()
    shutil.copy(folder / "cat.png", folder / "data/cat.png")
    lines = [{"image": "cat.png", "caption": "a cat"}, {"image": "cat.png", "caption": "an orange cat"}]
    (folder / "data/pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data/text.jsonl").write_text('{"text": "Cats purr."}\n')
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.mark for block in blocks(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_examples_of_a_page_run(
    page: Path, workshop: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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
            exec(compile(block.body, where, "exec"), names)
        elif block.mark:
            for words in commands(block.body):
                set_default_plugins(Plugins(plugins.entry_points))
                assert ran(words) == 0, f"{where}: {shlex.join(words)}"


def ran(words: list[str]) -> int:
    """Run a command in this process; return its exit code."""
    try:
        return typer.main.get_command(app).main(words, prog_name="janus-modular", standalone_mode=False) or 0
    except typer.Exit as stop:
        return stop.exit_code


@OF_PAGES
def test_links_lead_somewhere(page: Path):
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


@OF_PAGES
def test_files_that_a_page_names_are_there(page: Path):
    tops = "janus_modular|plugins|export|configs|tests|docs|bench"
    for name in re.findall(rf"`((?:{tops})/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists() or name in shipped(), name
