"""``/v1/responses`` by OpenAI's own client: answers, drawings, and conversations of several turns."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import openai
import pytest
from PIL import Image

from janus_modular import ImageInput, Message, Text
from janus_modular.janus import Janus

DRAW: dict[str, Any] = {"type": "image_generation"}
TOOL: dict[str, Any] = {"type": "image_generation", "seed": 5, "guidance": 2}
DRAWING: dict[str, Any] = {"tools": [TOOL], "tool_choice": DRAW}


GREY = Image.new("RGB", (8, 8), "grey")


def decoded(data: str) -> Image.Image:
    image = Image.open(BytesIO(base64.b64decode(data)))
    image.load()
    return image


def test_an_answer_is_that_of_the_program(client: openai.OpenAI, tiny_janus: Janus):
    expected = tiny_janus.chat(
        [Message("system", [Text("short")]), Message("user", [Text("what?")])], max_tokens=9
    )
    response = client.responses.create(model="tiny", instructions="short", input="what?", max_output_tokens=9)
    assert response.output_text == expected
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == expected.usage.prompt_tokens
    assert response.usage.output_tokens == 9
    assert response.settings["max_tokens"] == 9


def test_the_tool_draws_the_last_message(client: openai.OpenAI, tiny_janus: Janus):
    [expected] = tiny_janus.draw("a cat", 1, seed=5, guidance=2)
    response = client.responses.create(model="tiny", input="a cat", tools=[TOOL], tool_choice=DRAW)
    [call] = response.output
    assert (call.type, call.status, call.revised_prompt) == ("image_generation_call", "completed", "a cat")
    assert decoded(call.result).tobytes() == expected.tobytes()  # one image, as in the program
    assert response.settings["guidance"] == 2
    assert response.usage.output_tokens == 16


def test_a_drawn_image_is_read_in_the_next_turn(client: openai.OpenAI, tiny_janus: Janus):
    history: list[Any] = [{"role": "user", "content": "a cat"}]
    drawn = client.responses.create(model="tiny", input=history, tools=[TOOL], tool_choice="required")
    history += [item.model_dump(exclude_none=True) for item in drawn.output]
    history += [{"role": "user", "content": [{"type": "input_text", "text": "what is it?"}]}]
    answer = client.responses.create(model="tiny", input=history, max_output_tokens=9)
    [image] = tiny_janus.draw("a cat", 1, seed=5, guidance=2)
    expected = [
        Message("user", [Text("a cat")]),
        Message("assistant", [ImageInput(image)]),
        Message("user", [Text("what is it?")]),
    ]
    assert answer.output_text == tiny_janus.chat(expected, max_tokens=9)
    history += [item.model_dump(exclude_none=True) for item in answer.output]
    history += [{"role": "user", "content": "and now?"}]
    third = client.responses.create(model="tiny", input=history, max_output_tokens=9)
    expected += [Message("assistant", [Text(answer.output_text)]), Message("user", [Text("and now?")])]
    assert third.output_text == tiny_janus.chat(expected, max_tokens=9)


def data_uri(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def with_image(text: str, image: Image.Image) -> dict[str, Any]:
    """A message of the user."""
    parts = [{"type": "input_text", "text": text}, {"type": "input_image", "image_url": data_uri(image)}]
    return {"role": "user", "content": parts}


@pytest.mark.parametrize("form", [None, "encoded", "both"])
def test_the_tool_draws_from_the_images_of_the_last_message(
    client: openai.OpenAI, tiny_janus: Janus, form: str | None
):
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    expected = tiny_janus.draw("as a cat", 1, images=[image], image_form=form or "input", seed=5, guidance=2)
    tool = TOOL if form is None else {**TOOL, "image_form": form}
    response = client.responses.create(
        model="tiny", input=[with_image("as a cat", image)], tools=[tool], tool_choice=DRAW
    )
    [call] = response.output
    assert call.action == "edit"
    assert decoded(call.result).tobytes() == expected[0].tobytes()
    assert response.usage.input_tokens == expected.usage[0].prompt_tokens


def test_the_tool_edits_the_image_that_it_drew(client: openai.OpenAI, tiny_janus: Janus):
    history: list[Any] = [{"role": "user", "content": "a cat"}]
    drawn = client.responses.create(model="tiny", input=history, tools=[TOOL], tool_choice=DRAW)
    assert drawn.output[0].action == "generate"
    history += [item.model_dump(exclude_none=True) for item in drawn.output]
    history += [{"role": "user", "content": "in red"}]
    [image] = tiny_janus.draw("a cat", 1, seed=5, guidance=2)
    [expected] = tiny_janus.draw("in red", 1, images=[image], seed=5, guidance=2)
    for action, same in (("edit", True), ("auto", False), ("generate", False)):
        again = client.responses.create(
            model="tiny", input=history, tools=[{**TOOL, "action": action}], tool_choice=DRAW
        )
        assert (decoded(again.output[0].result).tobytes() == expected.tobytes()) is same


def test_streams_end_in_the_answer_as_a_whole(client: openai.OpenAI):
    options: dict[str, Any] = {"model": "tiny", "input": "what?", "max_output_tokens": 9}
    whole = client.responses.create(**options)
    events = [*client.responses.create(**options, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


def test_a_streamed_drawing_ends_in_the_image(client: openai.OpenAI):
    options: dict[str, Any] = {"model": "tiny", "input": "a cat", "tool_choice": DRAW}
    whole = client.responses.create(**options, tools=[TOOL])
    with client.responses.stream(**options, tools=[TOOL]) as stream:  # the client accumulates events itself
        assert stream.get_final_response().output[0].result == whole.output[0].result
    events = [*client.responses.create(**options, tools=[TOOL], stream=True)]
    assert events[-1].type == "response.completed"
    assert events[-1].response.output[0].result == whole.output[0].result
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:5] == [
        "created",
        "in_progress",
        "output_item.added",
        *(f"image_generation_call.{state}" for state in ("in_progress", "generating")),
    ]


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"tools": [TOOL]}, "tool_choice", "does not choose by itself"),
        ({"tool_choice": "required"}, "tool_choice", "no such tool"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the earlier items"),
        ({"store": True}, "store", "stores nothing"),
        ({**DRAWING, "instructions": "a"}, "instructions", "no effect on a drawing"),
        ({**DRAWING, "temperature": 1}, "temperature", "the tool's"),
        ({**DRAWING, "tools": [{**TOOL, "quality": "high"}]}, "quality", "one quality"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "image_generation"),
        ({**DRAWING, "input": [{"role": "assistant", "content": "a"}]}, "input", "last"),
        ({**DRAWING, "tools": [{**TOOL, "action": "edit"}]}, "input", "found no image"),
        ({**DRAWING, "tools": [{**TOOL, "image_form": "both"}]}, "image_form", "from text alone"),
        ({**DRAWING, "tools": [{**TOOL, "input_image_mask": {}}]}, "input_image_mask", "settings.prefix"),
        ({**DRAWING, "input": [with_image(" ", GREY)]}, "input", "no text"),
        (
            {
                "tools": [{**TOOL, "action": "generate"}],
                "tool_choice": DRAW,
                "input": [with_image("a", GREY)],
            },
            "input",
            "from its text alone",
        ),
        ({"input": []}, "input", ""),
    ],
)
def test_what_would_have_no_effect_is_an_error(
    client: openai.OpenAI, fields: dict[str, Any], param: str, text: str
):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "tiny", "input": "a", **fields})
    assert (caught.value.param or "").startswith(param)
    assert text in caught.value.message
