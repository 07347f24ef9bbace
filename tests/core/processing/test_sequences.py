"""Sequences: labels, positions of images, and special tokens in user text."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from janus_modular.errors import DataError, ImageError, PromptError
from janus_modular.processing.processor import Processor
from janus_modular.sequence import IGNORE_INDEX, ImageInput, ImageTarget, Message, Sample, Text, unconditional

Make = Callable[..., Processor]
BEGIN, END, PLACEHOLDER = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
EOS = "<｜end▁of▁sentence｜>"


def talk(*turns: Any, **options: Any) -> Sample:
    """Make a sample of contents: the user's, the assistant's, and so on."""
    contents = [turn if isinstance(turn, list) else [Text(turn)] for turn in turns]
    return Sample([Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)], **options)


@pytest.mark.parametrize("template", ["janus", "janus-pro", "plain"])
def test_answers_are_supervised_with_their_end_token(
    template: str, make: Make, learned: Callable[..., str]
) -> None:
    processor = make(template)
    sequence = processor.sequence(talk("2 + 2?", " 4 ", "And 3?", "5"))
    space = "" if template == "plain" else " "
    assert learned(processor, sequence) == f"{space}4{EOS}{space}5{EOS}"
    # labels are one ahead
    at = (sequence.labels != IGNORE_INDEX).nonzero()[0]
    assert (sequence.labels[at] == sequence.tokens[at + 1]).all()


@pytest.mark.parametrize("template", ["janus", "janus-pro", "plain"])
def test_supervision_starts_where_a_prompt_ends(template: str, make: Make, image: Callable[..., Any]) -> None:
    for source in (None, "bytes"):
        processor = make(template, **({"source": source} if source else {}))
        for answer in ([Text("yes")], [ImageTarget(image())]):
            sample = talk([ImageInput(image()), Text("what?")], answer)
            sequence = processor.sequence(sample)
            drawn = isinstance(answer[0], ImageTarget)
            prompt = (processor.draw_prompt if drawn else processor.chat_prompt)(sample.messages[:1])
            assert sequence.tokens[: len(prompt)].tolist() == prompt.tokens.tolist()
            first = (
                sequence.generation_mask.argmax() if drawn else (sequence.labels != IGNORE_INDEX).argmax() + 1
            )
            assert first == len(prompt)


def test_supervised_segments_decide(make: Make, learned: Callable[..., str]) -> None:
    processor = make()
    sample = talk(
        [Text("Repeat: "), Text("cat", True)], [Text("no", False)], "again", [Text("cat "), Text("dog", True)]
    )
    assert learned(processor, processor.sequence(sample)) == f" cat dog{EOS}"


def test_supervise_all_text(make: Make, image: Callable[..., Any], words: Callable[..., str]) -> None:
    processor = make(system="S")
    sequence = processor.sequence(talk([ImageInput(image()), Text("a")], "b"), supervise="all")
    missing = [PLACEHOLDER] * 4 + [BEGIN, END]
    unlearned = sequence.tokens[1:][sequence.labels[:-1] == IGNORE_INDEX]
    assert sorted(words(processor, [id]) for id in unlearned) == sorted(missing)
    # images to draw: "on the image tokens alone"
    drawing = processor.sequence(talk("a fox", [ImageTarget(image())]), supervise="all")
    assert (drawing.labels == IGNORE_INDEX).all()
    assert drawing.generation_supervised == [True]


def test_plain_text(make: Make, words: Callable[..., str], learned: Callable[..., str]) -> None:
    for source, bos in (("bytes", 256), (None, 1)):
        processor = make("plain", **({"source": source} if source else {}))
        sequence = processor.sequence(Sample([Message("user", [Text(" Once upon <eos> ")])], template=False))
        assert sequence.tokens[0] == bos
        assert (
            learned(processor, sequence) == words(processor, sequence.tokens[1:]) == f" Once upon <eos> {EOS}"
        )


def test_interleaved_image_inputs_and_targets(
    make: Make, image: Callable[..., Any], learned: Callable[..., str]
) -> None:
    processor = make(system="")
    sample = talk(
        [
            Text("From "),
            ImageInput(image(10)),
            Text(" and "),
            ImageInput(image(20)),
            Text(" make one."),
        ],
        [Text("Here:", True), ImageTarget(image(30)), Text("Better?", True)],
        [ImageTarget(image(40), supervised=False), ImageInput(image(50)), Text("Mine.")],
        [ImageTarget(image(60))],
    )
    sequence = processor.sequence(sample)
    assert [int(p.mean()) for p in sequence.understanding_pixels] == [
        pytest.approx(v, abs=60) for v in (10, 20, 50)
    ]
    assert [int(p[0, 0, 0]) for p in sequence.generation_images] == [30, 40, 60]
    assert [p.shape for p in sequence.generation_images] == [(3, 8, 8)] * 3
    assert [p.shape for p in sequence.understanding_pixels] == [(3, 16, 16)] * 3
    assert sequence.generation_supervised == [True, False, True]
    assert sequence.understanding_mask.sum() == 3 * 4
    assert sequence.generation_mask.sum() == 3 * 3
    assert not (sequence.understanding_mask & sequence.generation_mask).any()
    placeholder = processor.tokenizer.special_id("placeholder")
    assert (
        (sequence.tokens == placeholder) == (sequence.understanding_mask | sequence.generation_mask)
    ).all()
    begins = (sequence.tokens == processor.tokenizer.special_id("begin_image")).nonzero()[0]
    kinds = [bool(sequence.generation_mask[at + 1]) for at in begins]
    assert kinds == [False, False, True, True, False, True]
    assert learned(processor, sequence) == f" Here:Better?{EOS}"
    ends = processor.sequence(sample, learn_image_ends=True)
    assert learned(processor, ends) == f" Here:{BEGIN}{END}Better?{EOS}{BEGIN}{END}{EOS}"


def test_condition_dropout(make: Make, image: Callable[..., Any]) -> None:
    processor = make()
    sample = talk(
        [ImageInput(image()), Text("like this")],
        [Text("ok", True), ImageTarget(image(1))],
        [ImageInput(image(90))],
        [Text("a photo", True)],
    )
    whole = processor.sequence(sample)
    dropped = processor.sequence(sample, condition_dropout=True)
    first = int(whole.generation_mask.argmax())
    blank = unconditional(processor.draw_prompt([Message("user", [Text("x")])]), processor.pad_id).tokens
    assert dropped.tokens[:first].tolist() == [blank[0], *[processor.pad_id] * (first - 2), blank[-1]]
    assert (dropped.labels[:first] == IGNORE_INDEX).all()
    for field in ("tokens", "labels", "understanding_mask", "generation_mask"):
        assert (getattr(dropped, field)[first:] == getattr(whole, field)[first:]).all()
    assert len(dropped.understanding_pixels) == 1
    assert (dropped.understanding_pixels[0] == whole.understanding_pixels[1]).all()
    assert dropped.understanding_mask.sum() == 4
    assert len(dropped.generation_images) == 1
    # where nothing is drawn there is no condition
    text = talk("a", "b")
    assert (
        processor.sequence(text, condition_dropout=True).tokens.tolist()
        == processor.sequence(text).tokens.tolist()
    )


@pytest.mark.parametrize("template", ["janus", "janus-pro", "plain"])
@pytest.mark.parametrize("source", [None, "bytes"])
def test_text_never_becomes_special_tokens(
    template: str, source: str | None, make: Make, words: Callable[..., str]
) -> None:
    processor = make(template, **({"source": source} if source else {}))
    special = processor.tokenizer.special
    plain = np.isin(processor.sequence(talk("a", "b", "c", "d")).tokens, list(special.values())).sum()
    chance = random.Random(0)
    ingredients = [
        *special,
        *special,
        " ",
        "\n",
        "a",
        "User:",
        "<",
        "｜>",
        "你",
        "é",
        "🦊",
        "x0n0x",
        "\ufdd0",
        "{{ 1 }}",
    ]
    for _ in range(60):
        texts = ["x" + "".join(chance.choices(ingredients, k=chance.randint(1, 9))) + "y" for _ in range(4)]
        tokens = processor.sequence(talk(*texts)).tokens
        assert np.isin(tokens, list(special.values())).sum() == plain
        shown = words(processor, tokens)
        assert all(text in shown for text in texts)


def test_sample_without_supervision_is_an_error(make: Make, image: Callable[..., Any]) -> None:
    for sample in (
        talk("a", source="captions"),
        talk([ImageInput(image())], [ImageTarget(image(), supervised=False)], source="captions"),
        Sample([], source="captions"),
    ):
        with pytest.raises(DataError, match=r"'captions' has nothing to learn"):
            make("plain", "bytes").sequence(sample)


def test_sequence_longer_than_the_context_is_an_error(make: Make, image: Callable[..., Any]) -> None:
    processor = make("plain", "bytes", context=20)
    with pytest.raises(PromptError, match=r"takes 27 positions; the context has 20 \(source 'books'\)"):
        processor.sequence(talk("a" * 23, "b", source="books"))
    assert len(processor.draw_prompt("a" * 14)) == 17
    with pytest.raises(PromptError, match=r"takes 18 positions and 3 for the image; the context has 20"):
        processor.draw_prompt("a" * 15)
    with pytest.raises(PromptError, match="27 positions"):
        processor.chat_prompt([Message("user", [ImageInput(image()), Text("a" * 19)])])


def test_model_without_a_generation_path(make: Make, image: Callable[..., Any]) -> None:
    processor = make("plain", "bytes", drawing=None)
    with pytest.raises(PromptError, match="cannot draw"):
        processor.draw_prompt("a fox")
    with pytest.raises(PromptError, match="no generation path"):
        processor.sequence(talk("a", [ImageTarget(image())]))


def test_damaged_image_is_an_error(make: Make, tmp_path: Any, image: Callable[..., Any]) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with Image.open(tmp_path / "b.png") as damaged, pytest.raises(ImageError, match="damaged"):
        make().chat_prompt([Message("user", [ImageInput(damaged)])])


def test_the_condition_of_an_image_holds_given_images(make: Make, image: Callable[..., Any]) -> None:
    """It ends before the first image that is learned: one given as codes is dropped with the rest."""
    processor = make()
    given = [ImageInput(image(10)), ImageTarget(image(20), supervised=False), Text("blue")]
    sample = talk(given, [ImageTarget(image(30))], "again", [ImageTarget(image(40))])
    whole = processor.sequence(sample)
    dropped = processor.sequence(sample, condition_dropout=True)
    last = int(whole.generation_mask.nonzero()[0][3]) - 1  # before the second target, of three positions each
    assert (dropped.tokens[1:last] == processor.pad_id).all()
    assert dropped.tokens[last] == processor.tokenizer.special_id("begin_image")
    assert not (dropped.generation_mask | dropped.understanding_mask)[:last].any()
    assert [int(p[0, 0, 0]) for p in dropped.generation_images] == [30, 40]
    assert dropped.generation_supervised == [True, True]
    assert dropped.understanding_pixels == []
    assert (dropped.tokens[last:] == whole.tokens[last:]).all()
    assert dropped.generation_mask.sum() == 2 * 3
    # without an image that is learned there is no condition
    answered = talk(given, "nice")
    assert not any(processor.sequence(answered).generation_supervised)
    kept = processor.sequence(answered, condition_dropout=True)
    assert (kept.tokens == processor.sequence(answered).tokens).all()
