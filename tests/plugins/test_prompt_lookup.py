"""Text with drafts from what was said before: the words of the sampler `text`, and of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from janus_modular import ImageInput, Message, PromptError, SessionWrapper, Text
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_plugins.samplers import prompt_lookup, text
from janus_plugins.samplers.prompt_lookup import NO_TOKEN, PromptLookupSettings, look_up
from janus_plugins.samplers.text import TextSettings

QUESTIONS = ["abc abc abc abc", "x", "what is what"]
TOKENS = 40


@pytest.fixture(scope="module")
def janus() -> Janus:
    """A model that soon repeats itself when it is greedy: its weights are small."""
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)))


class CountingSession(SessionWrapper):
    """Counts the passes of the backbone after the prompts."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.passes = 0

    def extend(self, x: Any, counts: Any = None) -> Any:
        self.passes += 1
        return super().extend(x, counts)

    def step(self, x: Any, active: Any = None) -> Any:
        self.passes += 1
        return super().step(x, active)


def prompts_of(janus: Janus, questions: list[str] = QUESTIONS) -> list[Any]:
    return [janus.processor.chat_prompt([Message("user", [Text(question)])]) for question in questions]


def run(janus: Janus, prompts: list[Any], settings: TextSettings, ends: Any = None) -> tuple[Any, int]:
    """Return the ids (rows, steps), and the passes; row r ends after ``ends[r]`` tokens."""
    session = CountingSession(janus.runtime.open(max(map(len, prompts)) + settings.max_tokens))
    sampler = prompt_lookup if isinstance(settings, PromptLookupSettings) else text
    steps = sampler.sample_text(session, prompts, settings)  # type: ignore[arg-type]
    ids = [next(steps)]
    while True:
        active = None if ends is None else np.array([len(ids) < end for end in ends])
        try:
            ids.append(steps.send(active))
        except StopIteration:
            return np.stack(ids, axis=1), session.passes


@pytest.mark.parametrize("temperature", [0.0, 0.02, 1.0])
def test_words_are_those_of_sampling_one_by_one(janus: Janus, temperature: float) -> None:
    common: Any = {"max_tokens": TOKENS, "temperature": temperature, "top_k": 30, "top_p": 0.95, "seed": 4}
    expected, one_by_one = run(janus, prompts_of(janus), TextSettings(**common))
    ids, passes = run(janus, prompts_of(janus), PromptLookupSettings(**common))
    np.testing.assert_array_equal(ids, expected)
    assert one_by_one == TOKENS - 1
    assert passes < TOKENS // 2 if temperature == 0 else passes < TOKENS


@pytest.mark.parametrize("drafts", [3, 10])
def test_greedy_words_are_those_of_transformers(janus: Janus, drafts: int) -> None:
    backbone: Any = janus.model.backbone
    theirs = AutoModelForCausalLM.from_config(backbone.model.config).eval()
    theirs.load_state_dict(backbone.model.state_dict())
    for prompt in prompts_of(janus):
        ids = torch.from_numpy(prompt.tokens)[None]
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            prompt_lookup_num_tokens=drafts,
            suppress_tokens=[*janus.processor.suppressed_ids] or None,
            eos_token_id=None,
            pad_token_id=janus.processor.pad_id,
        )[0, len(prompt) :]
        ours, passes = run(janus, [prompt], PromptLookupSettings(max_tokens=TOKENS, window=drafts + 1))
        assert ours[0].tolist() == expected.tolist()
        assert passes < TOKENS // 2


def test_inactive_rows_end(janus: Janus) -> None:
    common: Any = {"max_tokens": 20, "temperature": 0.02}
    ends = [3, 20, 9]
    expected, _ = run(janus, prompts_of(janus), TextSettings(**common), ends)
    ids, _ = run(janus, prompts_of(janus), PromptLookupSettings(**common), ends)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(ids[row, :end], expected[row, :end])


def test_what_follows_an_image_is_no_draft(janus: Janus) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    pairs = [("what?", [ImageInput(image)]), ("what? what?", [ImageInput(image), ImageInput(image)])]
    prompts = [
        janus.processor.chat_prompt([Message("user", [*images, Text(words)])]) for words, images in pairs
    ]
    expected, _ = run(janus, prompts, TextSettings(max_tokens=20))
    ids, passes = run(janus, prompts, PromptLookupSettings(max_tokens=20))
    np.testing.assert_array_equal(ids, expected)
    assert passes < 19


@pytest.mark.parametrize(
    ("tokens", "count", "ngram", "drafts"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, 3, [9, 1]),
        ([1, 2, 8, 4, 2, 9, 4, 2], 5, 3, [9, 4, 2, 9, 4]),  # the latest place of the longest match
        ([5, 2, 3, 7, 6, 3], 3, 3, [7, 6, 3]),  # of one token, where no more match
        ([1, 2, 3], 4, 3, []),
        ([4], 4, 3, []),
        ([7, 7, 7, 7], 4, 3, [7, 7, 7, 7]),  # the end of the text is repeated
        ([1, 2, NO_TOKEN, 3, 1, 2], 4, 3, []),
        ([1, 2, 5, NO_TOKEN, 3, 1, 2], 4, 3, [5]),
    ],
)
def test_drafts_are_what_followed_the_last_words_before(
    tokens: list[int], count: int, ngram: int, drafts: list[int]
) -> None:
    assert look_up(tokens, count, ngram) == drafts


def test_unsupported_sessions_raise(janus: Janus) -> None:
    for name, value, message in [
        ("has_states", True, "choose the sampler 'text'"),
        ("max_feed", 3, "window: found 8; expected 3 at most"),
    ]:
        session = janus.runtime.open(64)
        setattr(session, name, value)
        with pytest.raises(PromptError, match=message):
            next(prompt_lookup.sample_text(session, prompts_of(janus)[:1], PromptLookupSettings()))


@pytest.mark.parametrize("setting", ["window", "ngram"])
def test_settings_are_checked(setting: str) -> None:
    with pytest.raises(PromptError, match=f"{setting}: found 0; expected a whole number from 1"):
        PromptLookupSettings(**{setting: 0})
