"""Reads files of questions: JSONL with answers or options, POPE's JSONL, MMBench's TSV.

Every line is checked before a question is asked.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_modular.errors import EvaluationError
from janus_modular.evaluation.ledger import sha256_of
from janus_modular.foreign import foreign_errors, read_text, sha256
from janus_modular.suggest import did_you_mean

LETTERS = "ABCDEFGH"
COLUMNS = {
    "questions": ("key", "image", "images", "question", "hint", "answer", "answers", "options", "category"),
    "captions": ("key", "image", "caption", "captions", "question", "category"),
    "pope": ("question_id", "image", "text", "label", "category"),
    "mmbench": (
        *("index", "image", "question", "hint", "answer", "category"),
        *("l2-category", "L2-category", "split", "source", "comment", "image_path"),
    ),
}
"""The columns of each format, besides those of options; the second line of MMBench's has no effect."""

DESCRIBE = "Describe this image."
"""What a model is asked for a caption."""

MAX_BYTES = 4 * 2**30
"""Largest file of questions: MMBench's have the images in them."""


@dataclass(frozen=True)
class Question:
    """A question, and what a right answer is."""

    key: str
    text: str
    images: tuple[Path | bytes, ...]
    answers: tuple[str, ...]  # any of them is right; the letter of an option; yes or no
    options: Mapping[str, str] = field(default_factory=dict)  # by letter
    category: str | None = None
    is_yes_or_no: bool = False

    def prompt(self, template: str | None) -> str:
        """Return the text that the model is asked."""
        options = "\n".join(f"{letter}. {text}" for letter, text in self.options.items())
        template = template if template is not None else self._template()
        values = {"question": self.text, "options": options}
        return re.sub(r"\{(question|options)\}", lambda match: values[match[1]], template)

    def _template(self) -> str:
        if self.is_yes_or_no:
            return "{question}\nPlease answer yes or no."
        return (
            "{question}\n{options}\nAnswer with the letter of the option." if self.options else "{question}"
        )

    def prompt_hash(self, template: str | None) -> str:
        """Return the hash of the prompt and of the content of its images."""
        hashes = (sha256_of(image) if isinstance(image, bytes) else sha256(image) for image in self.images)
        return sha256_of(self.prompt(template), *hashes)


def read_questions(
    format_name: str, path: Path, images: Path, ignore: Sequence[str] = (), template: str | None = None
) -> list[Question]:
    """Return the questions of a file, whose images are in the folder ``images``.

    Raises:
        EvaluationError: the file is missing or empty, or a line cannot be used; names line and field.
    """
    rows = list(_mmbench_rows(path) if format_name == "mmbench" else json_lines(path))
    if not rows:
        raise EvaluationError(f"{path} is empty; expected a question a line. Check the path.")
    cells = {str(row.get("index")): row.get("image") for _, row in rows}
    questions: dict[str, Question] = {}
    for line, row in rows:
        try:
            letters = LETTERS if format_name in ("questions", "mmbench") else ""
            _check_columns(row, [*COLUMNS[format_name], *letters, *ignore])
            question = _READERS[format_name](row, line, images, cells)
            if question.options and template is not None and "{options}" not in template:
                raise EvaluationError("has options, but prompt has no {options}: add it")
        except EvaluationError as error:
            raise EvaluationError(f"{path}, line {line}: {error}") from error
        if question.key in questions:
            raise EvaluationError(f"{path}, line {line}: key: '{question.key}' again; expected unique keys.")
        questions[question.key] = question
    return list(questions.values())


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line of a JSONL file; empty lines are skipped.

    Raises:
        EvaluationError: a line is not a JSON object.
    """
    for number, line in enumerate(read_text(path, EvaluationError).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{path}, line {number}: {error}; expected a JSON object.") from error
        if not isinstance(row, dict):
            raise EvaluationError(
                f"{path}, line {number}: found a {type(row).__name__}; expected a JSON object."
            )
        yield number, row


def _mmbench_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = csv.field_size_limit(2**30)  # cells hold images
    try:
        text = io.StringIO(read_text(path, EvaluationError, most=MAX_BYTES), newline="")
        reader = csv.DictReader(text, delimiter="\t", strict=True)
        with foreign_errors(path, EvaluationError, "Expected a TSV file with a header."):
            for row in reader:
                if None in row:
                    raise EvaluationError(
                        f"{path}, line {reader.line_num}: more cells than the header has columns; expected"
                        f" {len(reader.fieldnames or ())}, separated by tabs."
                    )
                yield reader.line_num, {name: cell for name, cell in row.items() if cell}
    finally:
        csv.field_size_limit(limit)


def _check_columns(row: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in row:
        if name not in known:
            hint = did_you_mean(name, known) or "To leave it out, name it in `ignore`."
            raise EvaluationError(f"{name}: an unknown column; expected {', '.join(known)}. {hint}")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"{name}: found {value!r:.80}; expected a text.")
    return value


def _file(name: Any, folder: Path) -> Path:
    if not isinstance(name, str) or not name:
        raise EvaluationError(f"image: found {name!r:.80}; expected the name of a file.")
    if not (folder / name).is_file():
        raise EvaluationError(f"image: there is no file '{folder / name}'. Check `images`, the folder.")
    return folder / name


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    """Return options by letter, of a list or of columns."""
    columns = {letter: _text(row, letter) for letter in LETTERS if row.get(letter) is not None}
    texts = row.get("options")
    if texts is None:
        if "".join(columns) != LETTERS[: len(columns)]:
            raise EvaluationError(f"{', '.join(columns)}: expected the options A, B, C, ... without a gap.")
        return columns
    if columns or not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise EvaluationError(
            f"options: found {texts!r:.80}{' and columns' * bool(columns)}; expected a list of 2 to"
            f" {len(LETTERS)} texts, or the columns A, B, ..."
        )
    return {letter: _text({"options": text}, "options") for letter, text in zip(LETTERS, texts, strict=False)}


def _answers(row: Mapping[str, Any], options: Mapping[str, str]) -> tuple[str, ...]:
    if not options and "answers" in row:
        if "answer" in row or not isinstance(row["answers"], list) or not row["answers"]:
            raise EvaluationError(
                f"answers: found {row['answers']!r:.80}; expected a list of texts, without answer."
            )
        return tuple(_text({"answers": answer}, "answers") for answer in row["answers"])
    if options and "answers" in row:
        raise EvaluationError("answers: beside options; expected answer, the letter of an option.")
    answer = _text(row, "answer")
    if not options:
        return (answer,)
    if answer.strip().upper() not in options:
        raise EvaluationError(f"answer: found '{answer:.80}'; expected one of {', '.join(options)}.")
    return (answer.strip().upper(),)


def _question(row: Mapping[str, Any], key: str, images: tuple[Path | bytes, ...]) -> Question:
    options = _options(row)
    hint = f"{_text(row, 'hint')}\n" if row.get("hint") else ""
    category = _text(row, "category") if row.get("category") is not None else None
    return Question(
        key, hint + _text(row, "question"), images, _answers(row, options), options, category
    )  # fmt: skip


def _from_json(row: Mapping[str, Any], line: int, folder: Path, cells: Mapping[str, Any]) -> Question:
    names = row.get("images", [row["image"]] if "image" in row else None)
    if not isinstance(names, list) or ("image" in row and "images" in row):
        raise EvaluationError("image: expected image (a file) or images (a list of files; [] for none).")
    key = _text(row, "key") if "key" in row else f"line {line}"
    return _question(row, key, tuple(_file(name, folder) for name in names))


def _from_captions(row: Mapping[str, Any], line: int, folder: Path, cells: Mapping[str, Any]) -> Question:
    key = _text(row, "key") if "key" in row else f"line {line}"
    text = _text(row, "question") if "question" in row else DESCRIBE
    category = _text(row, "category") if row.get("category") is not None else None
    return Question(key, text, (_file(row.get("image"), folder),), captions_of(row), {}, category)


def captions_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the caption or the captions of an image.

    Raises:
        EvaluationError: there is none, or there are both keys.
    """
    captions = row.get("captions", [row["caption"]] if "caption" in row else None)
    if not isinstance(captions, list) or not captions or ("caption" in row and "captions" in row):
        raise EvaluationError("caption: expected caption (a text) or captions (a list of texts).")
    return tuple(_text({"captions": caption}, "captions") for caption in captions)


def _from_pope(row: Mapping[str, Any], line: int, folder: Path, cells: Mapping[str, Any]) -> Question:
    label = row.get("label")
    if label not in ("yes", "no"):
        raise EvaluationError(f"label: found {label!r:.80}; expected yes or no.")
    category = _text(row, "category") if row.get("category") is not None else None
    images = (_file(row.get("image"), folder),)
    return Question(f"line {line}", _text(row, "text"), images, (label,), {}, category, is_yes_or_no=True)


def _from_mmbench(row: Mapping[str, Any], line: int, folder: Path, cells: Mapping[str, Any]) -> Question:
    cell = _text(row, "image")
    cell = str(cells.get(cell) or cell)  # the image of another row, by its index
    try:
        image = base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EvaluationError(
            f"image: {error}; expected an image in base64, or the index of a row."
        ) from error
    question = _question(row, _text(row, "index"), (image,))
    if not question.options:
        raise EvaluationError("A: missing; expected options in the columns A, B, C, D.")
    return question


_READERS: Mapping[str, Callable[[Mapping[str, Any], int, Path, Mapping[str, Any]], Question]] = {
    "questions": _from_json,
    "pope": _from_pope,
    "captions": _from_captions,
    "mmbench": _from_mmbench,
}
