"""`Janus.chat` and `Janus.draw`: rows with a KV cache against forward passes without one."""

import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from janus_modular import ConfigError, ImageInput, Message, PromptError, Text, unconditional
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.model.session import TorchSession
from janus_modular.plugins import default_plugins

IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30 + i, 3), dtype=np.uint8))
    for i in range(2)
]


def tiny(*overrides: str) -> Janus:
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", overrides), ModelConfig))
    model = assembly.model
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than at the start of a training, so that choices are clear
            torch.nn.init.normal_(weight, std=0.3)
    return Janus.of(assembly)


@pytest.fixture
def janus() -> Janus:
    return tiny()


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TorchSession]]:
    """All sessions that are opened, so that a test can look at their rows."""
    opened: list[TorchSession] = []
    start = TorchSession.__init__

    def noted(self: TorchSession, *args: object, **options: object) -> None:
        opened.append(self)
        start(self, *args, **options)

    monkeypatch.setattr(TorchSession, "__init__", noted)
    return opened


QUESTIONS = [("what?", [IMAGES[0]]), ("a longer question, no image", []), ("which?", IMAGES)]


@torch.no_grad()
def test_rows_go_on_as_if_alone(janus: Janus) -> None:
    """Prefill and steps of three variable-length rows, two images in one, against one forward pass a row."""
    prompts = [
        janus.processor.chat_prompt([Message("user", [*map(ImageInput, images), Text(text)])])
        for text, images in QUESTIONS
    ]
    session = janus.runtime.open(max_seq_len=max(map(len, prompts)) + 4)
    hidden = [session.prefill(prompts)]
    following = torch.randint(0, 250, (3, 4), generator=torch.Generator().manual_seed(0))
    for column in following.T:
        hidden.append(session.step(janus.model.backbone.embed(column[:, None])[:, 0]))
    for row, prompt in enumerate(prompts):
        x = torch.cat(
            [janus.model.embed(collate([prompt])), janus.model.backbone.embed(following[row : row + 1])],
            dim=1,
        )
        whole = janus.model.backbone(x, positions=torch.arange(x.shape[1])[None])[0, len(prompt) - 1 :]
        got = torch.stack([one[row] for one in hidden])
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(janus: Janus, temperature: float) -> None:
    together = janus.chat_batch(QUESTIONS, max_tokens=12, temperature=temperature)
    assert janus.chat(*QUESTIONS[0], max_tokens=12, temperature=temperature) == together[0]
    if temperature == 0:  # noise goes by row, so the others are alone in row 0 only when there is none
        assert [janus.chat(*q, max_tokens=12) for q in QUESTIONS] == together


def test_a_stream_is_the_answer(janus: Janus) -> None:
    said = list(janus.chat(*QUESTIONS[0], stream=True, max_tokens=12))
    assert len(said) > 1
    assert "".join(said).strip() == janus.chat(*QUESTIONS[0], max_tokens=12)


def test_an_answer_ends_before_a_stop_string(janus: Janus) -> None:
    answer = janus.chat(*QUESTIONS[1], max_tokens=40)
    stop = answer[len(answer) // 2 :][:2]
    assert janus.chat(*QUESTIONS[1], max_tokens=40, stop=[stop]) == answer[: answer.index(stop)].strip()


def test_words_never_hold_tokens_that_were_added_for_images(janus: Janus) -> None:
    session = janus.runtime.open(max_seq_len=8)
    hidden = torch.zeros(1, janus.model.backbone.hidden_size)
    best, _ = session.run("sample_text", hidden, torch.ones(1, session.vocab_size), torch.tensor(1.0), 0, 1.0)
    session.suppressed_ids = best
    noise = torch.ones(1, session.vocab_size)
    assert session.run("sample_text", hidden, noise, torch.tensor(1.0), 0, 1.0)[0] != best


def test_words_alone_run_no_visual_encoder(janus: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a visual encoder ran")

    for module in (janus.model.understanding, janus.model.generation.tokenizer):
        monkeypatch.setattr(type(module), "forward", refuse, raising=False)
    monkeypatch.setattr(janus.model.generation, "embed", refuse)
    janus.chat("no images here", max_tokens=3)


@torch.no_grad()
def naive_codes(janus: Janus, text: str, guidance: float) -> list[int]:
    """Draw greedily by whole forward passes, no cache: the plain reading of the papers' rule."""
    prompt = janus.processor.draw_prompt(text)
    rows = collate([prompt, unconditional(prompt, janus.processor.pad_id)])
    model, x = janus.model, janus.model.embed(rows)
    codes: list[int] = []
    for _ in range(model.generation.num_tokens):
        hidden = model.backbone(x, positions=torch.arange(x.shape[1]).expand(2, -1))[:, -1]
        conditional, free = model.generation.head(hidden, hidden[:, :0])
        codes.append(int((free + guidance * (conditional - free)).argmax()))
        x = torch.cat([x, model.generation.embed(torch.tensor([[codes[-1]]])).expand(2, -1, -1)], dim=1)
    return codes


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_greedy_drawing_is_the_plain_rule(janus: Janus, guidance: float) -> None:
    codes = torch.tensor([naive_codes(janus, "a cat", guidance)])
    expected = janus.model.generation.decode_image(codes)[0].permute(1, 2, 0).numpy()
    [image] = janus.draw("a cat", guidance=guidance, temperature=0)
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_without_guidance_an_image_is_one_row(janus: Janus, sessions: list[TorchSession]) -> None:
    janus.draw(["a", "b"], guidance=1)
    janus.draw(["a", "b"], guidance=2)
    assert [len(session.cache.lengths) for session in sessions] == [2, 4]


def codes_of(janus: Janus, monkeypatch: pytest.MonkeyPatch, **options: object) -> np.ndarray:
    drawn: list[np.ndarray] = []
    join = TorchSession.stack
    monkeypatch.setattr(
        TorchSession, "stack", lambda self, x: drawn.append(join(self, x).numpy()) or join(self, x)
    )
    janus.draw(["a", "a longer prompt"], 2, **options)
    monkeypatch.undo()
    return np.concatenate(drawn)


def test_drawings_follow_the_seed_alone(janus: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = codes_of(janus, monkeypatch, seed=1, guidance=3)
    np.testing.assert_array_equal(first, codes_of(janus, monkeypatch, seed=1, guidance=3, batch_size=1))
    np.testing.assert_array_equal(first, codes_of(janus, monkeypatch, seed=1, guidance=3, batch_size=3))
    assert (first != codes_of(janus, monkeypatch, seed=2, guidance=3)).any()
    assert (first[0] != first[1]).any()  # two images of one prompt


def test_progress_counts_to_the_end(janus: Janus) -> None:
    told: list[tuple[int, int]] = []
    janus.draw("a", n=3, batch_size=2, progress=lambda *steps: told.append(steps))
    assert told == [(done, 32) for done in range(1, 33)]  # two batches of 16 codes


def test_progress_is_printed_on_stderr_if_requested(janus: Janus, capsys: pytest.CaptureFixture[str]) -> None:
    janus.draw("a", progress=True)
    captured = capsys.readouterr()
    assert "drawing" in captured.err
    assert "100%" in captured.err
    janus.draw("a", progress=False)
    assert captured.out + "".join(capsys.readouterr()) == ""


def test_an_image_of_another_shape() -> None:
    janus = tiny("generation.height=16", "generation.width=48")
    assert [image.size for image in janus.draw("a", n=2)] == [(48, 16)] * 2


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    janus = tiny("backbone.config.max_position_embeddings=64")
    with pytest.raises(PromptError, match="64"):
        janus.chat("word " * 40)


def test_an_answer_ends_where_the_context_does() -> None:
    janus = tiny("backbone.config.max_position_embeddings=230")
    assert 0 < len(janus.chat("hello", max_tokens=500)) < 30  # 212 positions are the prompt's


def test_an_unknown_setting_is_named(janus: Janus) -> None:
    with pytest.raises(PromptError, match=r"guidence.*guidance"):
        janus.draw("a", guidence=3)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_setting_of_an_answer_that_makes_no_sense_is_named(janus: Janus, setting: dict[str, float]) -> None:
    with pytest.raises(PromptError, match=rf"{next(iter(setting))}: found .*; expected"):
        janus.chat("what?", **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
        {"seed": -1},
        {"n": 0},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_a_setting_of_a_drawing_that_makes_no_sense_is_named(janus: Janus, setting: dict[str, float]) -> None:
    with pytest.raises(PromptError, match=rf"{next(iter(setting))}: found .*; expected"):
        janus.draw("a", **setting)


def test_settings_may_come_from_numpy(janus: Janus) -> None:
    assert len(janus.draw("a", guidance=np.float32(2), seed=np.int64(3))) == 1


def test_one_image_needs_no_list(janus: Janus, tmp_path: Path) -> None:
    file = tmp_path / "digit.png"
    IMAGES[0].save(file)
    answer = janus.chat("what?", [IMAGES[0]], max_tokens=6)
    for image in (IMAGES[0], file, str(file), file.read_bytes()):
        assert janus.chat("what?", image, max_tokens=6) == answer


def test_compose_puts_parts_together_by_name() -> None:
    janus = Janus.from_components(
        encoder={
            "name": "vit",
            "feature_dim": 16,
            "layers": 1,
            "heads": 2,
            "pixels": {"height": 32, "width": 32},
        },
        tokenizer={"name": "vq", "channels": [8, 8, 16, 16], "num_codes": 16, "code_dim": 4},
        backbone={
            "name": "hf",
            "config": {
                "model_type": "qwen2",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 100,
            },
        },
        size=(16, 32),
        processor={"tokenizer": "bytes", "template": "plain"},
    )
    assert janus.draw("x", guidance=2)[0].size == (32, 16)
    assert janus.model.backbone.vocab_size >= janus.processor.tokenizer.vocab_size  # grown from 100


def test_compose_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="sigclip"):
        Janus.from_components(encoder="sigclip", backbone={"name": "hf", "config": {"model_type": "llama"}})


def test_an_array_is_one_image(janus: Janus) -> None:
    array = np.full((9, 9, 3), 200, np.uint8)
    answer = janus.chat("What?", array, max_tokens=3)
    assert answer == janus.chat("What?", [Image.fromarray(array)], max_tokens=3)
    assert answer.usage.prompt_tokens > janus.chat("What?", max_tokens=3).usage.prompt_tokens


def test_no_question_has_no_answer_and_half_a_question_is_refused(janus: Janus) -> None:
    assert janus.chat_batch([]) == []
    with pytest.raises(PromptError, match=r"found the question 'what\?'; expected a pair"):
        janus.chat_batch(["what?"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "expected the keys template, system"),
        ("5", "holds a int; expected a JSON object"),
        ('"a"', "holds a str; expected a JSON object"),
        (
            lambda good: good.replace('"context": 512', '"context": "x"'),
            "context: found 'x'; expected a whole",
        ),
    ],
)
def test_a_damaged_processor_is_an_error_with_its_file(
    janus: Janus, tmp_path: Path, content, message: str
) -> None:
    janus.save_pretrained(tmp_path / "model")
    file = tmp_path / "model/processor.json"
    changed = content if isinstance(content, str) else content(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(ConfigError, match=rf"processor\.json.*{message}"):
        Janus.from_pretrained(tmp_path / "model", device=torch.device("cpu"))


def test_known_settings_are_keywords_of_their_own() -> None:
    """Completion and help() show them; their defaults are the built-in samplers' (None)."""
    settings = {"chat": ("text_samplers", "text"), "draw": ("image_samplers", "autoregressive")}
    for method, (slot, sampler) in settings.items():
        parameters = inspect.signature(getattr(Janus, method)).parameters
        config = default_plugins().entry(slot, sampler).config
        names = {field.name for field in fields(config)} - {"numbers", "first", "prefix"}
        assert names <= set(parameters)
        assert {parameters[name].default for name in names} == {None}
        documented = inspect.getdoc(getattr(Janus, method)) or ""
        for field in fields(config):
            if field.name in names:
                assert f"{field.name} {field.default:g}" in " ".join(documented.split())
