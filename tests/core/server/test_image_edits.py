"""Drawing from images over ``/v1/images/edits``: by the official client, and as forms of other clients."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from janus_modular.janus import Janus

COLOURS = ("red", "blue")


def png(colour: str, size: tuple[int, int] = (20, 30)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def decoded(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(b64_json))), int)


def edit(client: openai.OpenAI, **options: Any) -> Any:
    return client.images.edit(
        **{"model": "tiny", "prompt": "a hat", "image": ("a.png", png("red"), "image/png"), **options}
    )


@pytest.mark.parametrize("form", [None, "input", "encoded", "both"])
def test_an_image_is_drawn_from_an_image_as_by_the_program(
    client: openai.OpenAI, tiny_janus: Janus, form: Any
) -> None:
    more = {} if form is None else {"image_form": form}
    answer = edit(client, n=2, extra_body={"seed": 5, "guidance": 2.5, **more})
    expected = tiny_janus.draw(
        "a hat", 2, images=Image.new("RGB", (20, 30), "red"), seed=5, guidance=2.5, **more
    )
    for data, image in zip(answer.data, expected, strict=True):
        assert np.abs(decoded(data.b64_json) - np.asarray(image, int)).max() <= 1
    [plain, _] = tiny_janus.draw("a hat", 2, seed=5, guidance=2.5)
    assert np.abs(decoded(answer.data[0].b64_json) - np.asarray(plain, int)).max() > 1
    usage = answer.usage
    given = {None: 16, "input": 16, "encoded": 16, "both": 32}[form]
    assert usage.input_tokens_details.image_tokens == 2 * given
    assert usage.input_tokens == sum(each.prompt_tokens for each in expected.usage)
    assert usage.input_tokens == usage.input_tokens_details.text_tokens + 2 * given
    assert (answer.settings["seed"], answer.settings["guidance"]) == (5, 2.5)


def test_several_images_and_settings_of_the_sampler(client: openai.OpenAI, tiny_janus: Janus) -> None:
    files = [(f"{colour}.png", png(colour), "image/png") for colour in COLOURS]
    answer = edit(client, image=files, extra_body={"seed": 1, "settings": {"prefix": [1, 2]}})
    images = [Image.new("RGB", (20, 30), colour) for colour in COLOURS]
    [expected] = tiny_janus.draw("a hat", images=images, seed=1, prefix=[1, 2])
    assert np.abs(decoded(answer.data[0].b64_json) - np.asarray(expected, int)).max() <= 1


def test_it_is_streamed(client: openai.OpenAI) -> None:
    events = [*edit(client, stream=True, partial_images=1, extra_body={"seed": 5})]
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    whole = edit(client, extra_body={"seed": 5})
    assert (decoded(events[-1].b64_json) == decoded(whole.data[0].b64_json)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": ("m.png", png("red"), "image/png")}, "mask: the model draws the whole image again"),
        ({"image": ("a.png", b"\x89PNG", "image/png")}, "is not an image that can be read"),
        ({"image": ("a.png", png("red", (5000, 5000)), "image/png")}, "25,000,000 pixels"),
        ({"image": [("a.png", png("red"), "image/png")] * 9}, "image: 9 images; this server takes 8"),
        ({"n": 9}, "n: 9 images; this server takes 8"),
        ({"size": "1x1"}, "size"),
        ({"prompt": ""}, "prompt"),
        ({"input_fidelity": "high"}, "input_fidelity: the model gets the images as image_form says"),
        ({"background": "transparent"}, "draws opaque images"),
        ({"extra_body": {"image_form": "codes"}}, "image_form: Input should be 'input', 'encoded' or 'both'"),
        ({"extra_body": {"seed": "x"}}, "seed: Input should be a valid integer"),
        ({"extra_body": {"colour": "x"}}, "colour: unknown"),
        ({"extra_body": {"prefix": "[1]"}}, "Put it into the field `settings`"),
        ({"extra_body": {"settings": {"window": 1}}}, "window"),
        ({"stream": False, "partial_images": 1}, "partial_images: has no effect without stream"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        edit(client, **options)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"json": {"prompt": "a"}}, "the body is no form"),
        ({"files": {"prompt": (None, "a")}}, "image: found none"),
        ({"files": {"prompt": (None, "a"), "image": (None, "x")}}, "image: found a text; expected a file"),
        ({"files": [("prompt", (None, "a")), ("prompt", (None, "b"))]}, "prompt: found twice"),
        ({"files": {"image": ("a.png", png("red"))}}, "prompt: Field required"),
        (
            {"content": b"--x\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            "form cannot be read|image: found none|prompt",
        ),
        (
            {"files": [("settings", (None, "{}")), ("settings[a]", (None, "1"))]},
            "settings: found as JSON and as single fields",
        ),
        (
            {"files": [("settings[a]", (None, "1")), ("settings[a][]", (None, "1"))]},
            r"settings\[a\]\[\]: found twice",
        ),
        ({"files": {"settings[a]": ("a.png", png("red")), "image": ("a.png", png("red"))}}, "prompt: Field"),
    ],
)
def test_other_bodies_are_refused(served: Any, request_: dict[str, Any], message: str) -> None:
    response = httpx.post(f"{served.address}/v1/images/edits", trust_env=False, timeout=60, **request_)
    assert response.status_code == 400
    assert re.search(message, response.json()["error"]["message"])


def test_variations_are_refused_with_the_reason(served: Any) -> None:
    files = {"image": ("a.png", png("red"))}
    response = httpx.post(f"{served.address}/v1/images/variations", files=files, trust_env=False)
    assert "from images and a prompt with /v1/images/edits" in response.json()["error"]["message"]


def test_the_description_has_the_form(served: Any) -> None:
    description = httpx.get(f"{served.address}/openapi.json", trust_env=False).json()
    body = description["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    schema = body["multipart/form-data"]["schema"]
    assert {"prompt", "image"} <= set(schema["required"])
    assert {"image_form", "guidance", "seed"} <= set(schema["properties"])
    assert json.dumps(schema).count("$ref") == 0
