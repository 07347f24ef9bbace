"""Fields of answers; answers and drawings do not depend on others in the batch."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular import ImageInput, Message, PromptError, Text, TextSamplerSettings
from janus_modular.answers import Answer, Usage
from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
CONTEXT = 56
QUESTIONS = [
    ("It", []),
    ("a longer question?", []),
    ("what?", [IMAGE]),
    ("why?", []),
]
BATCHES = [(0, 1), (3, 1, 2, 0), (2, 0, 0)]
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "seed": 4}


def tiny(*overrides: str) -> Janus:
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", overrides), ModelConfig))
    model = assembly.model
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than at the start of a training, so that choices are clear
            torch.nn.init.normal_(weight, std=0.3)
    return Janus.of(assembly)


@pytest.fixture(scope="module")
def janus() -> Janus:
    return tiny(f"backbone.config.max_position_embeddings={CONTEXT}", "processor.system=''")


@pytest.fixture(scope="module")
def folder(janus: Janus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "model"
    janus.save_pretrained(path)
    return path


def facts(answer: Answer) -> tuple[object, ...]:
    return str(answer), answer.finish_reason, answer.usage


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_do_not_depend_on_their_batch(janus: Janus, settings: dict[str, float]) -> None:
    """Room, noise and end are a row's own, with the room of max_tokens' default too."""
    alone = [facts(janus.chat(*question, **settings)) for question in QUESTIONS]
    assert len({text for text, *_ in alone}) == len(QUESTIONS)
    for batch in BATCHES:
        together = janus.chat_batch([QUESTIONS[i] for i in batch], **settings)
        first = [batch.index(i) == row for row, i in enumerate(batch)]
        expected = [alone[i] for i in batch]
        assert [facts(a) for a, new in zip(together, first, strict=True) if new] == [
            item for item, new in zip(expected, first, strict=True) if new
        ]


def test_repeated_questions_have_other_noise(janus: Janus) -> None:
    settings = {"temperature": 1.0, "seed": 3, "max_tokens": 12}
    pair = janus.chat_batch([QUESTIONS[0]] * 2, **settings)
    assert pair[0] != pair[1]
    again = janus.chat_batch([QUESTIONS[0], QUESTIONS[3], QUESTIONS[0]], **settings)
    assert [again[0], again[2]] == pair
    assert janus.chat(*QUESTIONS[0], numbers=[1], **settings) == pair[1]
    with pytest.raises(PromptError, match="numbers: found 1; expected one for each of 2"):
        janus.chat_batch(QUESTIONS[:2], numbers=[0])
    with pytest.raises(PromptError, match="numbers: found -1; expected a list of whole numbers"):
        janus.chat(*QUESTIONS[0], numbers=[-1])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "guidance": 1.0, "seed": 2},
        {"temperature": 0.8, "guidance": 4.0, "seed": 5},
    ],
    ids=["unguided", "guided"],
)
def test_drawings_do_not_depend_on_their_batch(janus: Janus, settings: dict[str, float]) -> None:
    prompts = ["a", "two dogs", "b"]
    alone = {
        prompt: [np.asarray(item, int) for item in janus.draw(prompt, 2, **settings)] for prompt in prompts
    }
    for order, size in (([2, 0, 1], 4), ([1, 1, 0], 2)):
        texts = [prompts[i] for i in order]
        n = 1 if texts[0] == texts[1] else 2  # a prompt given twice goes on where it ended
        drawn = janus.draw(texts, n, batch_size=size, **settings)
        counted = {text: iter(alone[text]) for text in texts}
        for text, image in zip([text for text in texts for _ in range(n)], drawn, strict=True):
            np.testing.assert_allclose(
                np.asarray(image, int), next(counted[text]), rtol=0, atol=1
            )  # truncated to 8 bits: a last digit may fall


def test_finish_reasons(janus: Janus) -> None:
    prompt = len(janus.processor.chat_prompt([Message("user", [Text("It")])]))
    cut = janus.chat("It", max_tokens=4)
    assert (cut.finish_reason, cut.was_cut, cut.usage) == ("length", True, Usage(prompt, 4))
    filled = janus.chat("It", max_tokens=5000)
    assert (filled.finish_reason, filled.was_cut) == ("context", True)
    assert filled.usage == Usage(prompt, CONTEXT - prompt)
    assert filled.usage.total_tokens == CONTEXT
    exact = janus.chat("It", max_tokens=CONTEXT - prompt)
    assert (exact, exact.finish_reason) == (filled, "length")
    stopped = janus.chat("It", stop=[filled[len(filled) // 2 :][:3]])
    assert (stopped.finish_reason, stopped.was_cut) == ("stop", False)
    assert 0 < stopped.usage.completion_tokens < filled.usage.completion_tokens


def test_finish_reasons_of_a_sampler(janus: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOS as the third token of one row; the other goes on."""
    end = janus.processor.tokenizer.special_id("eos")

    def sampler(session, prompts, settings):
        for step in range(settings.max_tokens):
            yield np.array([end if step == 2 and row == 0 else 65 for row in range(len(prompts))])

    monkeypatch.setattr(janus, "_text_sampler", lambda settings: (sampler, TextSamplerSettings(**settings)))
    first, second = janus.chat_batch([("It", []), ("Is", [])], max_tokens=6)
    assert (first, first.finish_reason, first.usage.completion_tokens) == ("AA", "stop", 3)
    assert (second, second.finish_reason, second.usage.completion_tokens) == ("AAAAAA", "length", 6)

    def short(session, prompts, settings):
        yield np.array([65])

    monkeypatch.setattr(janus, "_text_sampler", lambda settings: (short, TextSamplerSettings(**settings)))
    early = janus.chat("It", max_tokens=6)
    assert (early, early.finish_reason, early.was_cut) == ("A", "sampler", False)


def test_stream_ends_with_the_same_answer(janus: Janus) -> None:
    stream = janus.chat("It", max_tokens=7, stream=True)
    texts = [next(stream)]
    assert stream.answer.finish_reason is None
    texts += stream
    whole = janus.chat("It", max_tokens=7)
    assert "".join(texts).strip() == whole
    assert facts(stream.answer) == facts(whole)
    batch = janus.answers([("It", ()), ("why?", ())], max_tokens=7)
    for _ in batch:
        pass
    assert [item.finish_reason for item in batch.answers] == ["length", "length"]


def test_answer_is_a_str(janus: Janus) -> None:
    answer = Answer("four", "length", Usage(3, 1), {"seed": 7})
    assert (answer, f"{answer}!", json.dumps(answer)) == ("four", "four!", '"four"')
    for other in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert facts(other) == facts(answer)
        assert other.settings == {"seed": 7}


def test_results_are_made_again_from_their_settings(janus: Janus) -> None:
    answer = janus.chat("It is", temperature=1, seed=5, max_tokens=9)
    assert (answer.settings["seed"], answer.settings["max_tokens"]) == (5, 9)
    assert facts(janus.chat("It is", **answer.settings)) == facts(answer)
    assert facts(janus.chat("It is", **answer.settings | {"seed": 6})) != facts(answer)
    drawn = janus.draw("a", 2, temperature=1, seed=5, guidance=2)
    again = janus.draw("a", 2, **drawn.settings)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in drawn]
    assert drawn.settings["guidance"] == 2


def test_drawings_count_their_tokens(janus: Janus) -> None:
    drawn = janus.draw(["a", "a longer one"], 2, temperature=0)
    prompts = [len(janus.processor.draw_prompt(text)) for text in ("a", "a", "a longer one", "a longer one")]
    tokens = janus.model.generation.num_tokens
    assert drawn.usage == [Usage(prompt, image_tokens=tokens) for prompt in prompts]


def test_prompt_that_fills_the_context_is_an_error(janus: Janus) -> None:
    with pytest.raises(PromptError, match=r"question 1 has \d+ positions, the context 56|context has 56"):
        janus.chat_batch([("It", []), ("word " * 40, [])])


def test_chat_command_reports_a_cut_answer(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    plain = runner.invoke(app, ["chat", str(folder), "It", "--max-tokens", "3", "--device", "cpu"])
    assert (
        plain.stderr.strip()
        == "note: the answer was cut at max_tokens, 3; raise --max-tokens for a longer answer"
    )
    line = ["chat", str(folder), "It", "--device", "cpu", "--json"]
    done = runner.invoke(app, line)
    record = json.loads(done.stdout)
    prompt = record["usage"]["prompt_tokens"]
    assert record["finish_reason"] == "context"
    assert record["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": CONTEXT - prompt, "image_tokens": 0,
        "prompt_image_tokens": 0,
    }  # fmt: skip
    assert done.stderr == ""  # the record says it
    full = runner.invoke(app, line[:-1])
    assert f"cut where the model's context ends, {CONTEXT} positions" in full.stderr
    stop = record["answer"][:2]
    whole = runner.invoke(app, [*line, "--stop", stop])
    assert (json.loads(whole.stdout)["finish_reason"], whole.stderr) == ("stop", "")


def test_draw_command_reports_token_counts(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    line = ["draw", str(folder), "a", "-n", "2", "-o", str(output), "--json", "--device", "cpu"]
    record = json.loads(CliRunner().invoke(app, line).stdout)
    assert record["grid"] == str(output)
    assert [Path(item["file"]).is_file() for item in record["images"]] == [True, True]
    assert {item["usage"]["image_tokens"] for item in record["images"]} == {16}
    assert record["images"][0]["usage"]["completion_tokens"] == 0


def test_questions_with_images_keep_their_rows(janus: Janus) -> None:
    """Images of several rows go through the encoder together, and back to their own rows."""
    other = Image.new("RGB", (20, 20), "red")
    questions = [[Message("user", [ImageInput(image), Text("what?")])] for image in (IMAGE, other, IMAGE)]
    together = janus.chat_batch([(item, ()) for item in questions], max_tokens=8)
    assert together == [janus.chat(item, max_tokens=8) for item in questions]
