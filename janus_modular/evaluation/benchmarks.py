"""Reads the prompt lists of public benchmarks, and names the files in which each expects its images.

The metrics are the benchmarks' own: their programs read the folders that are written here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from janus_modular.errors import EvaluationError
from janus_modular.evaluation.questions import json_lines
from janus_modular.foreign import foreign_errors, read_text

MAX_NAME = 255
"""Most bytes of a file's name on common file systems."""


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt, and the files of its images, relative to the output folder."""

    text: str
    files: tuple[str, ...]  # one for each image, or one for the grid of all
    first: int = 0  # number of its first image: a repeated prompt gets other images
    metadata: Mapping[str, str] = field(default_factory=dict)  # texts of other files, by name


def read_prompts(format_name: str, path: Path, n: int) -> list[BenchmarkPrompt]:
    """Return the prompts of a benchmark's file or folder, with ``n`` images each.

    Raises:
        EvaluationError: the list is missing or empty, or a prompt cannot be used; names line and field.
    """
    prompts = _READERS[format_name](path, n)
    if not prompts:
        raise EvaluationError(f"{path} has no prompts. Check the path.")
    files: set[str] = set()
    drawn: dict[str, int] = {}
    numbered = []
    for prompt in prompts:
        for file in prompt.files:
            if file in files:
                raise EvaluationError(f"{path}: '{file}' would be written twice; expected unique names.")
            files.add(file)
        first = drawn.get(prompt.text, 0)
        drawn[prompt.text] = first + n
        numbered.append(replace(prompt, first=first))
    return numbered


def _geneval(path: Path, n: int) -> list[BenchmarkPrompt]:
    """Read a JSON object a line: images/00000/metadata.jsonl, images/00000/samples/0000.png, ..."""
    prompts = []
    for index, (line, row) in enumerate(json_lines(path)):
        folder = f"images/{index:05d}"
        files = tuple(f"{folder}/samples/{number:04d}.png" for number in range(n))
        metadata = {f"{folder}/metadata.jsonl": json.dumps(row, ensure_ascii=False) + "\n"}
        text = _text(row.get("prompt"), f"{path}, line {line}: prompt")
        prompts.append(BenchmarkPrompt(text, files, metadata=metadata))
    return prompts


def _dpg_bench(path: Path, n: int) -> list[BenchmarkPrompt]:
    """Read a folder of .txt files, a prompt each: a grid of 2 x 2 images, named as the file."""
    if not path.is_dir():
        raise EvaluationError(f"{path} is no folder; expected the folder of DPG-Bench's .txt files.")
    return [
        BenchmarkPrompt(
            _text(read_text(file, EvaluationError).strip(), str(file)), (f"images/{file.stem}.png",)
        )
        for file in sorted(path.glob("*.txt"))
    ]


def _t2i_compbench(path: Path, n: int) -> list[BenchmarkPrompt]:
    """Read a prompt a line: samples/PROMPT_000000.png; the number counts the images of all prompts."""
    lines = read_text(path, EvaluationError).split("\n")
    texts = [line.partition("\t")[0].strip() for line in lines]  # some lists have notes after a tab
    numbered = [(number, text) for number, text in enumerate(texts, 1) if text]
    return [
        BenchmarkPrompt(
            text,
            tuple(f"samples/{_file_name(f'{text}_{index * n + i:06d}.png', path, line)}" for i in range(n)),
        )
        for index, (line, text) in enumerate(numbered)
    ]


def _wise(path: Path, n: int) -> list[BenchmarkPrompt]:
    """Read a JSON array of objects with prompt_id and Prompt: images/PROMPT_ID.png."""
    with foreign_errors(path, EvaluationError, "Expected a JSON array of objects."):
        rows = json.loads(read_text(path, EvaluationError))
    if not isinstance(rows, list):
        raise EvaluationError(f"{path}: found a {type(rows).__name__}; expected a JSON array of objects.")
    prompts = []
    for index, row in enumerate(rows):
        where = f"{path}, object {index}"
        if not isinstance(row, dict) or not str(row.get("prompt_id", "")).isdigit():
            raise EvaluationError(f"{where}: prompt_id: expected an object with a whole number prompt_id.")
        text = _text(row.get("Prompt"), f"{where}: Prompt")
        prompts.append(BenchmarkPrompt(text, (f"images/{row['prompt_id']}.png",)))
    return prompts


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"{where}: found {value!r:.80}; expected a text to draw.")
    return value


def _file_name(name: str, path: Path, line: int) -> str:
    if "/" in name or "\0" in name or len(name.encode()) > MAX_NAME:
        raise EvaluationError(
            f"{path}, line {line}: the prompt '{name:.80}' names its files; expected no / in it, and at most"
            f" {MAX_NAME} bytes with the number. Change the line."
        )
    return name


_READERS: Mapping[str, Callable[[Path, int], list[BenchmarkPrompt]]] = {
    "geneval": _geneval,
    "dpg-bench": _dpg_bench,
    "t2i-compbench": _t2i_compbench,
    "wise": _wise,
}
