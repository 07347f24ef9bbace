"""Evaluations with answers continue; the ledger of another evaluation is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from janus_modular.errors import EvaluationError, PromptError
from janus_modular.evaluation.run import read_data, run_evaluation
from janus_modular.evaluation.schema import EvalConfig

ANSWERS = {"q1": "Orange.", "q2": "blue", "q3": "It is green", "q4": "(B)", "q5": "A"}


@pytest.fixture
def config(tmp_path: Path, images: Path) -> EvalConfig:
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "question": f"q{n}", "answer": answer}
        for n, answer in enumerate(["orange", "blue", "green"], 1)
    ]
    rows += [{"image": "b.png", "question": f"q{n}", "options": ["x", "y"], "answer": "B"} for n in (4, 5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvalConfig("questions", str(tmp_path / "questions.jsonl"), images=str(images), batch_size=2)


def test_given_answers_have_the_accuracy_counted_by_hand(
    config: EvalConfig, tmp_path: Path, stand_in: Callable[..., Any], identity: dict[str, Any]
):
    model = stand_in(ANSWERS)
    results = run_evaluation(model, read_data(config), config, tmp_path / "out", identity)
    assert results.metrics == {"all": {"questions": 5, "accuracy": 3 / 5, "no_option": 0.0}}
    assert [len(batch) for batch in model.batches] == [2, 2, 1]
    _, *lines = map(json.loads, (tmp_path / "out/ledger.jsonl").read_text().splitlines())
    assert [(line["key"], line["answer"], line["right"]) for line in lines] == [
        ("line 1", "Orange.", True),
        ("line 2", "blue", True),
        ("line 3", "It is green", False),
        ("line 4", "(B)", True),
        ("line 5", "A", False),
    ]


def test_an_interrupted_evaluation_continues(
    config: EvalConfig, tmp_path: Path, stand_in: Callable[..., Any], identity: dict[str, Any]
):
    data, out = read_data(config), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(stand_in(ANSWERS, fail_after=2), data, config, out, identity)
    with (out / "ledger.jsonl").open("a") as file:
        file.write('{"key": "line 3", "ans')  # killed while it wrote
    model = stand_in(ANSWERS)
    results = run_evaluation(model, data, config, out, identity)
    assert [question[:2] for batch in model.batches for question in batch] == ["q3", "q4", "q5"]
    whole = run_evaluation(stand_in(ANSWERS), data, config, tmp_path / "whole", identity)
    assert results.metrics == whole.metrics
    assert (out / "ledger.jsonl").read_bytes() == (tmp_path / "whole/ledger.jsonl").read_bytes()
    again = stand_in({})
    assert run_evaluation(again, data, config, out, identity).metrics == whole.metrics
    assert again.batches == []


def test_a_killed_evaluation_continues_from_any_file_operation(
    config: EvalConfig,
    tmp_path: Path,
    stand_in: Callable[..., Any],
    identity: dict[str, Any],
    killed_at: Callable[[int, Callable[[], object]], bool],
):
    data, number = read_data(config), 0
    run_evaluation(stand_in(ANSWERS), data, config, tmp_path / "whole", identity)

    def evaluate() -> None:
        run_evaluation(stand_in(ANSWERS), data, config, tmp_path / f"out{number}", identity)

    while killed_at(number, evaluate):
        evaluate()
        ledger = (tmp_path / f"out{number}/ledger.jsonl").read_bytes()
        assert ledger == (tmp_path / "whole/ledger.jsonl").read_bytes()
        number += 1
    assert number > len(ANSWERS)


def test_an_error_of_the_model_names_the_questions(
    config: EvalConfig, tmp_path: Path, stand_in: Callable[..., Any], identity: dict[str, Any]
):
    class Refusing(stand_in):  # type: ignore[misc, valid-type]
        def chat_batch(self, pairs: Any, **settings: Any) -> Any:
            raise PromptError("the prompt of question 1 has 600 positions, the context 512: shorten it")

    with pytest.raises(PromptError, match=r"questions\.jsonl, 'line 1' to 'line 2': .* 600 positions"):
        run_evaluation(Refusing(ANSWERS), read_data(config), config, tmp_path / "out", identity)


def test_a_folder_that_cannot_be_written_is_named(
    config: EvalConfig, tmp_path: Path, stand_in: Callable[..., Any], identity: dict[str, Any]
):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match=r"file/out could not be written: .* continues"):
        run_evaluation(stand_in(ANSWERS), read_data(config), config, tmp_path / "file/out", identity)


@pytest.mark.parametrize("change", ["settings", "model", "prompt", "image", "line", "format"])
def test_a_ledger_of_something_else_is_refused(
    change: str, config: EvalConfig, tmp_path: Path, stand_in: Callable[..., Any], identity: dict[str, Any]
):
    out = tmp_path / "out"
    run_evaluation(stand_in(ANSWERS), read_data(config), config, out, identity)
    expected = "ledger of another evaluation"
    if change == "settings":
        config.settings["max_tokens"] = 3
    elif change == "model":
        identity["sha256"] = "1" * 64
    elif change == "prompt":
        config.prompt = "{question}\n{options}"
    elif change == "image":
        file = Path(str(config.images)) / "a.png"
        file.write_bytes((file.parent / "b.png").read_bytes())
        expected = "'line 1' has the result of another prompt or image"
    elif change == "line":
        lines = (out / "ledger.jsonl").read_text().splitlines()
        (out / "ledger.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
        expected = "line 2: found no JSON"
    else:
        (out / "ledger.jsonl").write_text('{"loss": 1}\n')
    written = (out / "ledger.jsonl").read_bytes()
    model = stand_in(ANSWERS)
    with pytest.raises(EvaluationError, match=expected):
        run_evaluation(model, read_data(config), config, out, identity)
    assert model.batches == []
    assert (out / "ledger.jsonl").read_bytes() == written
