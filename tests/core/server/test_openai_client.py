"""OpenAI's own client against the server: what it gets is what `Janus` gives in a program."""

from __future__ import annotations

import asyncio
import base64
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from janus_modular.errors import PluginError
from janus_modular.janus import Janus
from janus_modular.server import event_stream

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def data_uri(image: Image.Image, image_format: str = "PNG") -> str:
    file = BytesIO()
    image.save(file, image_format)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def decoded(b64_json: str) -> Image.Image:
    image = Image.open(BytesIO(base64.b64decode(b64_json)))
    image.load()
    return image


QUESTION: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_uri(IMAGE)}},
            {"type": "text", "text": "what?"},
        ],
    }
]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 3}


def ask(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, **options)


def test_an_answer_is_that_of_the_program_with_its_settings_and_usage(
    client: openai.OpenAI, tiny_janus: Janus
):
    expected = tiny_janus.chat("what?", [IMAGE], max_tokens=12, **SAMPLED)
    completion = ask(client, QUESTION, **SAMPLED, extra_body={"top_k": 40})
    assert completion.settings["top_k"] == 40
    completion = ask(client, QUESTION, **SAMPLED)
    [choice] = completion.choices
    assert choice.message.content == expected
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason == "length"
    assert completion.settings == {
        name: value for name, value in expected.settings.items() if name != "numbers"
    }
    assert completion.usage.prompt_tokens == expected.usage.prompt_tokens
    assert completion.usage.completion_tokens == expected.usage.completion_tokens == 12


def test_several_answers_are_those_of_a_repeated_question(client: openai.OpenAI, tiny_janus: Janus):
    expected = tiny_janus.chat_batch([("what?", [IMAGE])] * 3, max_tokens=12, **SAMPLED)
    completion = ask(client, QUESTION, n=3, **SAMPLED)
    assert [choice.message.content for choice in completion.choices] == expected
    assert len(set(expected)) == 3
    assert completion.usage.completion_tokens == 36


def test_a_stream_is_the_answer_in_chunks(client: openai.OpenAI):
    whole = ask(client, QUESTION, n=2, **SAMPLED)
    chunks = [*ask(client, QUESTION, n=2, stream=True, stream_options={"include_usage": True}, **SAMPLED)]
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length", "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.settings["seed"] for chunk in chunks if hasattr(chunk, "settings")} == {3}


def test_a_conversation_has_roles_and_ends_at_stop_strings(client: openai.OpenAI, tiny_janus: Janus):
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}], "refusal": None},
        {"role": "user", "content": "c", "name": None},
    ]
    whole = ask(client, messages).choices[0].message.content
    cut = ask(client, messages, stop=whole[3:5]).choices[0]
    assert cut.message.content == whole.partition(whole[3:5])[0].strip()
    assert cut.finish_reason == "stop"
    other = ask(client, [{**messages[0], "content": "long"}, *messages[1:]])
    assert other.choices[0].message.content != whole


def test_a_seed_that_was_not_set_is_reported_and_gives_the_answer_again(client: openai.OpenAI):
    first, second = (ask(client, QUESTION, temperature=1) for _ in range(2))
    assert first.settings["seed"] != second.settings["seed"]
    again = ask(client, QUESTION, temperature=1, seed=first.settings["seed"])
    assert again.choices[0].message.content == first.choices[0].message.content
    header = {"x-request-id": "mine"}
    drawn = [draw(client, extra_headers=header) for _ in range(2)]
    assert drawn[0].data == drawn[1].data
    assert drawn[0].settings["seed"] == drawn[1].settings["seed"] != draw(client).settings["seed"]


def draw(client: openai.OpenAI, **options: Any) -> Any:
    return client.images.generate(model="tiny", prompt="a cat", **options)


def assert_same_codes(image: Image.Image, expected: Image.Image) -> None:
    """Other codes change whole patches; decoding a batch of another size sums in another order.

    Then a channel that is truncated to 8 bits may differ by 1.
    """
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_images_of_another_size_are_those_of_the_program(client: openai.OpenAI, tiny_janus: Janus):
    answer = draw(client, size="48x32", extra_body={"seed": 5})
    image = decoded(answer.data[0].b64_json)
    assert (answer.size, image.size) == ("48x32", (48, 32))
    assert_same_codes(image, tiny_janus.draw("a cat", seed=5, size=(32, 48))[0])


def test_images_are_those_of_the_program_with_their_settings_and_usage(
    client: openai.OpenAI, tiny_janus: Janus
):
    expected = tiny_janus.draw("a cat", 2, seed=5, guidance=2, temperature=0.7)
    answer = draw(client, n=2, size="32x32", extra_body={"seed": 5, "guidance": 2, "temperature": 0.7})
    images = [decoded(image.b64_json) for image in answer.data]
    for image, drawn in zip(images, expected, strict=True):
        assert_same_codes(image, drawn)
    assert (answer.size, answer.output_format, answer.background) == ("32x32", "png", "opaque")
    settings = {name: value for name, value in expected.settings.items() if name not in ("numbers", "first")}
    assert answer.settings == {**settings, "prefix": list(settings["prefix"])}
    assert answer.usage.output_tokens == sum(usage.image_tokens for usage in expected.usage)
    assert answer.usage.output_tokens_details.image_tokens == answer.usage.output_tokens
    assert answer.usage.input_tokens == sum(usage.prompt_tokens for usage in expected.usage)


@pytest.mark.parametrize(("output_format", "options"), [("jpeg", {"output_compression": 80}), ("webp", {})])
def test_images_come_in_other_formats(client: openai.OpenAI, output_format: Any, options: dict[str, Any]):
    png = draw(client, extra_body={"seed": 1})
    other = draw(client, output_format=output_format, extra_body={"seed": 1}, **options)
    image = decoded(other.data[0].b64_json)
    assert image.format == output_format.upper()
    pixels = [np.asarray(decoded(a.data[0].b64_json).convert("RGB"), float) for a in (png, other)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 40  # of noise, which these formats blur


@pytest.mark.parametrize("n", [1, 2])
def test_partial_images_come_before_the_images(client: openai.OpenAI, n: int):
    whole = draw(client, n=n, extra_body={"seed": 1})
    events = [*draw(client, n=n, stream=True, partial_images=3, extra_body={"seed": 1})]
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert events == [*partial, *completed]
    for index in range(n):
        mine = [event for event in partial if event.image_index == index]
        assert [event.partial_image_index for event in mine] == [0, 1, 2]
        images = [decoded(event.b64_json) for event in mine]
        final = decoded(completed[index].b64_json)
        assert_same_codes(final, decoded(whole.data[index].b64_json))
        assert all(image.size == (32, 32) for image in images)
        assert len({image.tobytes() for image in [*images, final]}) == 4  # each has more codes
    assert completed[0].usage.output_tokens == 16
    assert completed[0].settings == whole.settings


def test_a_stream_without_events_has_comments(
    served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(event_stream, "KEEP_ALIVE", 0.0)
    body = {"prompt": "a cat", "stream": True, "seed": 1}
    text = httpx.post(f"{served.address}/v1/images/generations", json=body, trust_env=False).text
    assert text.startswith(": still working\n\n")
    [event] = draw(client, stream=True, extra_body={"seed": 1})
    assert event.type == "image_generation.completed"


def test_models_are_listed(client: openai.OpenAI):
    [model] = client.models.list().data
    assert (model.id, model.object, model.image_size) == ("tiny", "model", "32x32")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


REFUSED = [
    ("chat", {"logprobs": True}, "logprobs", "unsupported_parameter", "no probabilities"),
    ("chat", {"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "no tools"),
    ("chat", {"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "no penalties"),
    ("chat", {"best_of": 2}, "best_of", "unknown_parameter", "no effect"),
    ("chat", {"temperature": "hot"}, "temperature", "invalid_value", "number"),
    ("chat", {"temperature": 1e-9}, None, "invalid_prompt", "temperature"),
    ("chat", {"max_completion_tokens": 3}, "max_completion_tokens", "invalid_value", "differs"),
    (
        "chat",
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "invalid_value",
        "without stream",
    ),
    ("chat", {"n": 9}, "n", "limit_exceeded", "8 at most"),
    ("chat", {"settings": {"numbers": [1]}}, "settings.numbers", "invalid_value", "set by n"),
    ("chat", {"settings": {"heat": 1}}, None, "invalid_prompt", "no such setting"),
    ("chat", {"model": "other"}, "model", "model_not_found", "'tiny'"),
    ("chat", {"messages": []}, "messages", "invalid_value", "at least 1"),
    ("chat", {"messages": [{"role": "tool", "content": "a"}]}, "messages.0", "invalid_value", "expected"),
    ("images", {"response_format": "url"}, "response_format", "unsupported_parameter", "b64_json"),
    ("images", {"size": "60x64"}, "size", "invalid_value", "draws 32x32 and not this"),
    ("images", {"quality": "hd"}, "quality", "unsupported_parameter", "guidance"),
    ("images", {"partial_images": 2}, "partial_images", "invalid_value", "without stream"),
    ("images", {"output_compression": 50}, "output_compression", "invalid_value", "png"),
    ("images", {"output_format": "svg"}, "output_format", "invalid_value", "png"),
    ("images", {"guidance": 1e9}, None, "invalid_prompt", "guidance"),
    ("images", {"settings": {"guidance": 1}, "guidance": 2}, "settings.guidance", "invalid_value", "field"),
]


@pytest.mark.parametrize(("route", "fields", "param", "code", "text"), REFUSED)
def test_what_would_have_no_effect_is_an_error_with_the_reason(
    client: openai.OpenAI, route: str, fields: dict[str, Any], param: str | None, code: str, text: str
):
    asked = [{"role": "user", "content": "a"}]
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        ask(client, asked, extra_body=fields) if route == "chat" else draw(client, extra_body=fields)
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert text in error.message


def test_fields_that_ask_for_nothing_are_accepted(client: openai.OpenAI):
    fields: dict[str, Any] = {
        "logprobs": False, "tools": [], "frequency_penalty": 0, "response_format": {"type": "text"},
        "logit_bias": None, "user": "somebody",
    }  # fmt: skip
    assert ask(client, [{"role": "user", "content": "a"}], extra_body=fields).choices
    assert draw(client, quality="auto", background="opaque", response_format="b64_json").data


def test_answers_and_drawings_of_many_clients_are_those_of_each_alone(served: Any, tiny_janus: Janus):
    """More requests than rows, in one batch."""

    async def all_at_once() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.address}/v1", api_key="none", max_retries=0
        ) as client:
            calls: list[Any] = []
            for seed in range(8):
                messages: list[Any] = [{"role": "user", "content": f"what is {seed}?"}]
                options: dict[str, Any] = {"temperature": 1, "seed": seed, "max_tokens": 10 + seed}
                calls.append(client.chat.completions.create(model="tiny", messages=messages, **options))
                drawing = {"seed": seed, "guidance": 2 if seed % 2 else 1}
                calls.append(client.images.generate(prompt=f"cat {seed}", extra_body=drawing))
            return await asyncio.gather(*calls)

    results = asyncio.run(all_at_once())
    for seed, (answer, drawing) in enumerate(zip(results[::2], results[1::2], strict=True)):
        options: dict[str, Any] = {"temperature": 1, "seed": seed, "max_tokens": 10 + seed}
        assert answer.choices[0].message.content == tiny_janus.chat(f"what is {seed}?", **options)
        [expected] = tiny_janus.draw(f"cat {seed}", 1, seed=seed, guidance=2 if seed % 2 else 1)
        assert_same_codes(decoded(drawing.data[0].b64_json), expected)
    stats = served.service.engine.stats()
    assert stats.running == stats.waiting == stats.answer_rows == stats.draw_rows == 0


def test_other_samplers_give_the_same_words_and_images(
    start: Any, tiny_janus: Janus, monkeypatch: pytest.MonkeyPatch
):
    words = tiny_janus.chat("what?", max_tokens=12)
    [image] = tiny_janus.draw("a cat", 1, seed=5)
    runtime = tiny_janus.runtime  # of other tests too: its samplers are restored afterwards
    monkeypatch.setattr(runtime, "text_sampler", runtime.text_sampler)
    monkeypatch.setattr(runtime, "image_sampler", runtime.image_sampler)
    served = start(text_sampler="prompt-lookup", image_sampler="parallel")
    with served.client() as client:
        [model] = client.models.list().data
        assert (model.text_sampler, model.image_sampler) == ("prompt-lookup", "parallel")
        answer = ask(client, [{"role": "user", "content": "what?"}])
        assert answer.choices[0].message.content == words
        assert "window" in answer.settings
        assert_same_codes(decoded(draw(client, extra_body={"seed": 5}).data[0].b64_json), image)
    with pytest.raises(PluginError, match="Did you mean 'parallel'"):
        start(image_sampler="parallels")
