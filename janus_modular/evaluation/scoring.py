"""Scores answers: exact match after normalisation, multiple choice, and POPE's yes or no."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from janus_modular.evaluation.questions import Question

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Metrics = dict[str, float]
"""Metrics by name."""

Scored = tuple[Question, str]
"""A question with the answer of the model."""


def normalised(text: str) -> str:
    """Return an answer as VQA compares it: lower case, without articles and punctuation, numbers as digits.

    A punctuation mark beside a space, and every mark of a text with a comma between digits, is removed; any
    other mark becomes a space. A full stop is removed unless a digit follows. Contractions are not changed.
    """
    text = " ".join(text.split())
    result = text
    has_number = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or has_number else " ")
    result = re.sub(r"\.(?!\d)", "", result).lower()
    digits = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
    return " ".join(digits.get(word, word) for word in result.split() if word not in ARTICLES)


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that an answer names, or None.

    The first of these rules that applies: the answer is a letter, or begins with a letter, maybe after ``(``,
    and one of ``.:,)``; it says ``answer is`` or ``answer:`` before such a letter; it is the text of one
    option, normalised, with or without its letter before it.
    """
    letters = "".join(options)
    answer = answer.strip()
    for pattern in (
        rf"^\(?([{letters}])(?:[.:,)]|$)",
        rf"\banswer(?: is|:)\s*(?:option\s+)?\(?([{letters}])(?:[.:,)]|$)",
    ):
        if match := re.search(pattern, answer, re.IGNORECASE):
            return match[1].upper()
    texts = {letter: normalised(text) for letter, text in options.items()}
    same = [
        letter
        for letter, text in texts.items()
        if normalised(answer) in (text, normalised(f"{letter} {options[letter]}"))
    ]
    return same[0] if len(same) == 1 else None


def says_yes(answer: str) -> bool:
    """Return POPE's reading of an answer: False if its first sentence has the word No, no or not."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def is_right(question: Question, answer: str) -> bool:
    """Return True if the answer is right, by the rule of the question's type."""
    if question.is_yes_or_no:
        return says_yes(answer) == (question.answers[0] == "yes")
    if question.options:
        return chosen_option(answer, question.options) == question.answers[0]
    return normalised(answer) in map(normalised, question.answers)


def accuracy(scored: Sequence[Scored]) -> Metrics:
    """Return the share of right answers; for multiple choice also the share that names no option."""
    metrics = {
        "questions": len(scored),
        "accuracy": sum(is_right(*pair) for pair in scored) / len(scored),
    }
    choices = [pair for pair in scored if pair[0].options]
    if choices:
        unreadable = sum(chosen_option(answer, question.options) is None for question, answer in choices)
        metrics["no_option"] = unreadable / len(choices)
    return metrics


def pope(scored: Sequence[Scored]) -> Metrics:
    """Return POPE's metrics, with ``yes`` as the positive class; a ratio of nothing is 0."""
    pairs = [(says_yes(answer), question.answers[0] == "yes") for question, answer in scored]
    both = pairs.count((True, True))
    predicted = sum(prediction for prediction, _ in pairs)
    labelled = sum(label for _, label in pairs)
    return {
        "questions": len(pairs),
        "accuracy": sum(prediction == label for prediction, label in pairs) / len(pairs),
        "precision": both / predicted if predicted else 0.0,
        "recall": both / labelled if labelled else 0.0,
        "f1": 2 * both / (predicted + labelled) if predicted + labelled else 0.0,
        "yes_ratio": predicted / len(pairs),
    }


def by_category(
    scored: Sequence[Scored], measure: Callable[[Sequence[Scored]], Metrics]
) -> dict[str, Metrics]:
    """Return the metrics of all questions (``all``), and of those of each category."""
    groups = {"all": measure(scored)}
    categories: Iterable[str] = sorted({q.category for q, _ in scored if q.category is not None})
    for category in categories:
        groups[f"category {category}"] = measure([pair for pair in scored if pair[0].category == category])
    return groups
