"""Metrics on given answers, with values by hand and by scikit-learn."""

from __future__ import annotations

import random

import pytest

from janus_modular.evaluation.questions import Question
from janus_modular.evaluation.scoring import (
    accuracy,
    by_category,
    chosen_option,
    is_right,
    normalised,
    pope,
    says_yes,
)

OPTIONS = {"A": "a cat", "B": "a dog", "C": "two birds"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("  an   orange\ncat ", "orange cat"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes!", "yes"),
        ("it's", "it's"),
        ("A", ""),
        ("theatre", "theatre"),
    ],
)
def test_answers_are_normalised_as_vqa_does(text: str, expected: str):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (B) ", "B"),
        ("B.", "B"),
        ("B: a dog", "B"),
        ("(C) two birds", "C"),
        ("The answer is B.", "B"),
        ("Answer: C", "C"),
        ("the answer is option (A)", "A"),
        ("A dog", "B"),
        ("B a dog", "B"),
        ("2 birds", "C"),
        ("A", "A"),
        ("A bird", None),
        ("D", None),
        ("The answer is a dog", None),
        ("", None),
        ("cat dog", None),
    ],
)
def test_the_option_of_an_answer(answer: str, letter: str | None):
    assert chosen_option(answer, OPTIONS) == letter


def test_options_of_equal_text_are_matched_by_letter():
    assert chosen_option("dog", {"A": "dog", "B": "the dog"}) is None
    assert chosen_option("B", {"A": "dog", "B": "the dog"}) == "B"


def test_any_of_several_answers_is_right():
    question = Question("1", "?", (), ("blue", "The navy"))
    assert [is_right(question, answer) for answer in ("Blue.", "navy", "red", "")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True),
        ("No, there is none.", False),
        ("There is not.", False),
        ("No dog, no cat", False),
        ("NO", True),
        ("I see nothing", True),
        ("A cat. No dog.", True),
        ("", True),
    ],
)
def test_yes_and_no_are_read_as_pope_does(answer: str, expected: bool):
    assert says_yes(answer) is expected


def test_accuracy_by_category():
    scored = [
        (Question("1", "?", (), ("A",), OPTIONS, "pets"), "A"),
        (Question("2", "?", (), ("A",), OPTIONS, "pets"), "B"),
        (Question("3", "?", (), ("C",), OPTIONS, "birds"), "who knows"),
        (Question("4", "?", (), ("B",), OPTIONS), "a dog"),
    ]
    assert by_category(scored, accuracy) == {
        "all": {"questions": 4, "accuracy": 0.5, "no_option": 0.25},
        "category birds": {"questions": 1, "accuracy": 0.0, "no_option": 1.0},
        "category pets": {"questions": 2, "accuracy": 0.5, "no_option": 0.0},
    }


def yes_or_no(pairs: list[tuple[str, str]]) -> list[tuple[Question, str]]:
    """Return scored questions of (answer, label)."""
    return [(Question("", "?", (), (label,), is_yes_or_no=True), answer) for answer, label in pairs]


def test_metrics_of_pope_by_hand():
    pairs = [("yes", "yes"), ("yes", "yes"), ("no", "yes"), ("yes", "no"), ("no", "no")]
    assert pope(yes_or_no(pairs)) == {
        "questions": 5,
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": 2 / 3,
        "yes_ratio": 3 / 5,
    }


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_pope_are_those_of_scikit_learn(seed: int):
    from sklearn import metrics

    rng = random.Random(seed)
    pairs = [(rng.choice(["yes", "yes", "no"]), rng.choice(["yes", "no", "no"])) for _ in range(50)]
    answers, labels = zip(*pairs, strict=True)
    found = pope(yes_or_no(pairs))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, answers))
    for name, score in {
        "precision": metrics.precision_score,
        "recall": metrics.recall_score,
        "f1": metrics.f1_score,
    }.items():
        assert found[name] == pytest.approx(score(labels, answers, pos_label="yes")), name
    assert found["yes_ratio"] == answers.count("yes") / 50


@pytest.mark.parametrize(("answer", "label"), [("no", "no"), ("no", "yes"), ("yes", "no")])
def test_ratios_of_nothing_are_zero(answer: str, label: str):
    found = pope(yes_or_no([(answer, label)]))
    assert [found[name] for name in ("precision", "recall", "f1")] == [0, 0, 0]
