"""Files of questions: each form is read, and each bad line is an error with line and field."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from janus_modular.errors import EvaluationError
from janus_modular.evaluation.questions import read_questions


def jsonl(folder: Path, *rows: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_questions_with_answers_and_options(tmp_path: Path, images: Path):
    file = jsonl(
        tmp_path,
        {"image": "a.png", "question": "Colour?", "answers": ["orange", "amber"], "category": "colour"},
        {
            "images": ["a.png", "b.png"],
            "question": "Which is blue?",
            "options": ["first", "second"],
            "answer": "b",
        },
        {
            "image": "b.png",
            "question": "{options}?",
            "A": "x",
            "B": 2,
            "C": "z",
            "answer": "C",
            "key": 7,
            "hint": "!",
        },
    )
    first, second, third = read_questions("questions", file, images)
    assert (first.key, first.answers, first.category) == ("line 1", ("orange", "amber"), "colour")
    assert first.prompt(None) == "Colour?"
    assert second.images == (images / "a.png", images / "b.png")
    assert second.answers == ("B",)
    assert (third.key, third.options) == ("7", {"A": "x", "B": "2", "C": "z"})
    assert third.prompt("{question}|{options}") == "!\n{options}?|A. x\nB. 2\nC. z"


def test_the_form_of_pope(tmp_path: Path, images: Path):
    file = jsonl(
        tmp_path, {"question_id": 1, "image": "a.png", "text": "A cat?", "label": "no", "category": "random"}
    )
    (question,) = read_questions("pope", file, images)
    assert (question.answers, question.category, question.is_yes_or_no) == (("no",), "random", True)
    assert question.prompt(None) == "A cat?\nPlease answer yes or no."


def test_the_form_of_mmbench(tmp_path: Path, images: Path):
    cell = base64.b64encode((images / "a.png").read_bytes()).decode()
    header = "index\timage\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\tl2-category"
    rows = [
        f'5\t{cell}\t"Which ""one""?\n\nNow."\t\torange\tblue\t\t\tA\tcolour\tx',
        "6\t5\tAgain?\tLook.\t1\t2\t3\t4\tD\tn\tx",
    ]
    file = tmp_path / "mmbench.tsv"
    file.write_text("\n".join([header, *rows]), "utf-8")
    first, second = read_questions("mmbench", file, tmp_path)
    assert first.text == 'Which "one"?\n\nNow.'
    assert first.options == {"A": "orange", "B": "blue"}
    assert first.images == ((images / "a.png").read_bytes(),) == second.images
    assert (second.key, second.text, second.answers, second.category) == ("6", "Look.\nAgain?", ("D",), "n")


GOOD = {"image": "a.png", "question": "?", "answer": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "image": "c.png"}, "line 2: image: there is no file"),
        ({**GOOD, "image": 3}, "line 2: image: found 3"),
        ({**GOOD, "imagee": "a.png"}, "line 2: imagee: an unknown column"),
        ({**GOOD, "images": []}, "line 2: image: expected image (a file) or images"),
        ({**GOOD, "question": " "}, "line 2: question: found ' '"),
        ({"image": "a.png", "question": "?"}, "line 2: answer: found None"),
        ({**GOOD, "answers": ["x"]}, "line 2: answers: found ['x']"),
        ({"image": "a.png", "question": "?", "answers": []}, "line 2: answers: found []"),
        ({**GOOD, "options": ["x", "y"]}, "line 2: answer: found 'x'; expected one of A, B."),
        ({**GOOD, "options": ["x"]}, "line 2: options: found ['x']"),
        ({**GOOD, "A": "x", "C": "y"}, "line 2: A, C: expected the options"),
        ({**GOOD, "A": "x", "options": ["x", "y"]}, "line 2: options: found ['x', 'y'] and columns"),
        ({**GOOD, "key": "line 1"}, "line 2: key: 'line 1' again"),
        ([1], "line 2: found a list; expected a JSON object"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number_and_field(
    tmp_path: Path, images: Path, row: Any, message: str
):
    with pytest.raises(EvaluationError) as error:
        read_questions("questions", jsonl(tmp_path, GOOD, row), images)
    assert message in str(error.value)


def test_ignored_columns_have_no_effect(tmp_path: Path, images: Path):
    file = jsonl(tmp_path, {**GOOD, "source": "web"})
    assert read_questions("questions", file, images, ["source"]) == read_questions(
        "questions", jsonl(tmp_path, GOOD), images
    )


@pytest.mark.parametrize("format_name", ["questions", "pope", "mmbench"])
def test_empty_and_missing_files(tmp_path: Path, format_name: str):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(EvaluationError, match="is empty"):
        read_questions(format_name, tmp_path / "empty", tmp_path)
    with pytest.raises(EvaluationError, match="missing"):
        read_questions(format_name, tmp_path / "missing", tmp_path)


def test_other_errors(tmp_path: Path, images: Path):
    with pytest.raises(EvaluationError, match="line 1: label: found 'maybe'; expected yes or no"):
        read_questions("pope", jsonl(tmp_path, {"image": "a.png", "text": "?", "label": "maybe"}), images)
    (tmp_path / "x.tsv").write_text("index\timage\tquestion\tA\tB\tanswer\n1\t!!\t?\tx\ty\tA\n")
    with pytest.raises(EvaluationError, match=r"line 2: image: .* expected an image in base64"):
        read_questions("mmbench", tmp_path / "x.tsv", images)
    (tmp_path / "x.tsv").write_text("index\timage\tquestion\tA\tB\tanswer\n1\tAAAA\t?\tx\ty\tC\n")
    with pytest.raises(EvaluationError, match="line 2: answer: found 'C'; expected one of A, B"):
        read_questions("mmbench", tmp_path / "x.tsv", images)
    (tmp_path / "x.tsv").write_text("index\timage\n1\tAAAA\t?\n")
    with pytest.raises(EvaluationError, match="line 2: more cells than the header"):
        read_questions("mmbench", tmp_path / "x.tsv", images)
    with pytest.raises(EvaluationError, match=r"prompt has no \{options\}"):
        read_questions(
            "questions",
            jsonl(tmp_path, {**GOOD, "options": ["x", "y"], "answer": "A"}),
            images,
            (),
            "{question}",
        )


def test_the_hash_of_a_prompt_covers_its_images(tmp_path: Path, images: Path):
    first, second = read_questions("questions", jsonl(tmp_path, GOOD, {**GOOD, "image": "b.png"}), images)
    assert first.prompt_hash(None) != second.prompt_hash(None)
    assert first.prompt_hash(None) != first.prompt_hash("{question} Briefly.")
