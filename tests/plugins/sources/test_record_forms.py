"""Records of other projects' tools are read as defined there; no field is silently ignored."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from janus_modular import DataError
from janus_plugins.records.fields import HARMLESS, Fields
from janus_plugins.sources.jsonl import Jsonl, JsonlConfig

from .conftest import shape

PAGE = Path(__file__).parents[3] / "docs/how-to/data-formats.md"
RNG = np.random.default_rng
ASK = [("user", [("read", 10), ("What?", False)]), ("assistant", [("A.", True)])]


def uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def chat(content: Any, answer: Any = "A.", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


@pytest.mark.parametrize(
    "content",
    [
        [{"image": "a.png"}, "What?"],
        [{"read": "a.png"}, {"text": "What?"}],
        [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}],
        [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}],
        [{"type": "image", "url": "a.png"}, {"type": "text", "text": "What?"}],
        [{"type": "image_url", "image_url": "a.png"}, "What?"],
        [{"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, "What?"],
        [{"type": "image", "image": {"bytes": None, "path": "a.png"}}, "What?"],
        [
            {"type": "image_url", "text": None, "image_url": {"url": "a.png", "detail": None}},
            {"type": "text", "text": "What?", "image_url": None},
        ],
    ],
)
def test_images_inside_the_content(read: Any, content: Any) -> None:
    assert shape(read(chat(content)).sample(0, RNG(0))) == ASK


def test_images_by_uri(read: Any, images: Path) -> None:
    for reference in (uri(images / "a.png"), (images / "a.png").as_uri(), f"file://localhost{images}/a.png"):
        assert shape(read(chat([{"image": reference}, "What?"])).sample(0, RNG(0))) == ASK
    (images / "a b%.png").write_bytes((images / "a.png").read_bytes())
    assert shape(read(chat([{"image": (images / "a b%.png").as_uri()}, "What?"])).sample(0, RNG(0))) == ASK


@pytest.mark.parametrize(
    "record",
    [
        chat("<image>What?", images=["a.png"]),
        chat("<image_placeholder>What?", images=[{"path": "a.png", "bytes": None}]),
        chat("<image>What?", image="a.png"),
        chat([{"type": "image"}, {"type": "text", "text": "What?"}], images=["a.png"], videos=[], tools=""),
        chat("<image>What?", image="a.png", system=""),
        {
            "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}],
            "image": "a.png",
            "id": "1",
        },
        {
            "conversations": [{"role": "user", "content": "<image>What?"}, {"from": "model", "value": "A."}],
            "image": ["a.png"],
        },
    ],
)
def test_images_beside_the_conversation(read: Any, record: Any) -> None:
    assert shape(read(record).sample(0, RNG(0))) == ASK


def test_markers_take_the_images_in_order_in_any_turn(read: Any) -> None:
    record = chat("1 <image> 2\n<image>", "So:<image>", images=["a.png", "b.png", "a.png"], system="S")
    assert shape(read(record).sample(0, RNG(0))) == [
        ("system", [("S", False)]),
        ("user", [("1 ", False), ("read", 10), (" 2\n", False), ("read", 200)]),
        ("assistant", [("So:", True), ("draw", 10, True)]),
    ]


@pytest.mark.parametrize("form", ["caption", "text", "class"])
@pytest.mark.parametrize("image", ["image", "file_name"])
def test_text_beside_an_image(read: Any, form: str, image: str) -> None:
    record = {image: "b.png", form: "a cat", "width": 4, "height": 3}
    reads = read(record, questions=["?"]).sample(0, RNG(0))
    assert shape(reads) == [("user", [("read", 200), ("?", False)]), ("assistant", [("a cat", True)])]
    draws = read(record, task="draw").sample(0, RNG(0))
    assert shape(draws) == [("user", [("a cat", False)]), ("assistant", [("draw", 200, True)])]


@pytest.mark.parametrize("key", ["caption", "captions", "text"])
def test_each_of_several_captions_is_chosen(read: Any, key: str) -> None:
    data = read({"image": "a.png", key: ["one", "two", "three"]}, task="draw")
    assert {shape(data.sample(0, RNG(i)))[0][1][0][0] for i in range(30)} == {"one", "two", "three"}


@pytest.mark.parametrize("flag", ["train", "loss", "weight"])
@pytest.mark.parametrize("no", [False, 0, 0.0])
def test_unsupervised_turns(read: Any, flag: str, no: Any) -> None:
    record = chat("Q")
    record["messages"] += [{"role": "assistant", "content": "bad", flag: no}]
    sample = read(record).sample(0, RNG(0))
    assert [text for _, [text] in shape(sample)] == [("Q", False), ("A.", True), ("bad", False)]
    assert sample.exact_supervision
    assert not read(chat("Q")).sample(0, RNG(0)).exact_supervision


def test_unsupervised_image_target(read: Any) -> None:
    record = chat("Q")
    record["messages"][1] = {"role": "assistant", "content": [{"image": "a.png"}], "train": False}
    assert shape(read(record, task="draw").sample(0, RNG(0)))[1] == ("assistant", [("draw", 10, False)])


def turn(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", **more}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            chat("<image>What?"),
            "positions for images: 1 (the first in messages[0]: content of user[0])",
        ),
        (chat("<image>What?", images=[]), "images listed beside the content: 0"),
        (chat("<image> <image>", images=["a.png"]), "positions for images: 2 (the first"),
        (chat("What?", images=["a.png"]), "positions for images: 0; images listed beside the content: 1"),
        (chat([{"image": "a.png"}, "<image>"]), "positions for images: 1 "),
        (chat([{"type": "image"}]), "positions for images: 1 "),
        (chat("Q", image="a.png", images=["a.png"]), "has images and image; expected only one"),
        (chat("<video>Q"), "holds '<video>'; the only marker that is read is <image>"),
        (chat("<|image_pad|>Q", images=["a.png"]), "holds '<|image_pad|>'"),
        (chat("See <image 1>.", images=["a.png"]), "holds '<image 1>'"),
        ({"text": "<ImageHere> Q"}, "holds '<ImageHere>'"),
        (chat("[IMG]Q"), "holds '[IMG]'"),
        (chat("[img-1] Q"), "holds '[img-1]'"),
        ({"text": "<image/> Q"}, "holds '<image/>'"),
        ({"image": {"url": {"url": {"url": "a.png"}}}, "caption": "a"}, "image: found {'url': 'a.png'}"),
        (chat("Q", system=3), "system: found 3"),
        (chat("Q", videos=["a.mp4"]), "'videos': video cannot be read"),
        (chat("Q", tools="[{}]"), "calls of tools"),
        (chat("Q", text="T"), "found the unknown keys 'text'"),
        (chat("Q", chosen=["x"]), "preference"),
        (chat([{"type": "video", "video": "x"}]), "has type 'video'; expected text, image, image_url"),
        (
            chat([{"type": "text", "text": "Q", "image": "a.png"}]),
            "messages[0]: content of user[0]: found the unknown keys",
        ),
        (chat([{"image": "a.png", "draw": "b.png"}]), "has draw and image; expected only one"),
        (chat([{}]), "found {}"),
        (chat(""), "content of user: is empty"),
        (chat("Q", "  "), "content of assistant: is empty"),
        (chat([], "A"), "found []; expected a list that is not empty"),
        (chat("Q", system="S") | {"messages": [{"role": "system", "content": "T"}]}, "has `system`, and"),
        (turn(weight=0.5), "found 0.5 as train, loss or weight"),
        (turn(train="no"), "found 'no' as train"),
        (turn(loss=True, weight=0), "has loss and weight"),
        (
            turn(weihgt=0),
            "messages[1]: found the unknown keys 'weihgt'; expected role, from, content, value, train",
        ),
        (turn(weihgt=0), "Did you mean 'weight'?"),
        (turn(tool_calls=[{"id": 1}]), "calls of tools"),
        (turn(name="Bob"), "found the unknown keys 'name'"),
        ({"text": "a <image> b"}, "holds '<image>', for which there is no image"),
        ({"text": "<image_placeholder>"}, "holds '<image_placeholder>'"),
        ({"text": "a", "images": ["a.png"]}, "found the unknown keys 'images'"),
        ({"text": "a", "caption": "b"}, "found the unknown keys 'caption'"),
        ({"image": "a.png"}, "an image with no text"),
        ({"image": "a.png", "captoin": "a"}, "Did you mean 'caption'?"),
        ({"image": "a.png", "caption": "a", "class": "b"}, "an image with caption and class"),
        ({"image": "a.png", "text": "a", "caption": "b"}, "an image with caption and text"),
        ({"image": "a.png", "file_name": "b.png", "text": "a"}, "has image and file_name"),
        ({"image": "a.png", "text": "<image> a"}, "holds '<image>'"),
        ({"image": "a.png", "caption": []}, "caption: found []"),
        ({"image": "a.png", "caption": ["a", ""]}, "caption[1]: found ''"),
        ({"image": ["a.png", "b.png"], "caption": "a"}, "2 images for one caption"),
        ({"image": "https://x.org/a.png", "caption": "a"}, "an address; training reads no network"),
        ({"image": {"url": "s3://b/a.png"}, "caption": "a"}, "an address"),
        ({"image": {"bytes": "AAAA"}, "caption": "a"}, "has the image's bytes"),
        ({"image": {"pth": "a.png"}, "caption": "a"}, "image: found the unknown keys 'pth'"),
        ({"image": "data:image/png;base64,@@@", "caption": "a"}, "not base64"),
        ({"image": "data:text/plain,hello", "caption": "a"}, "expected data:image/TYPE;base64,DATA"),
        ({"image": "file://server/a.png", "caption": "a"}, "names no file of this machine"),
        ({"image": "a\0.png", "caption": "a"}, "cannot be a path"),
        ({"image": "x" * 5000, "caption": "a"}, "cannot be a path"),
        ({"instruction": "Q", "output": "A"}, "write instruction and answer as `messages`"),
        ({"prompt": "Q", "completion": "A"}, "as `messages`"),
        ({"messages": None}, "has nothing; expected messages"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "role 'tool'"),
        ({"text": "half \ud83d"}, r"has '\ud83d', half of a surrogate pair"),
        (chat("half \udc00"), r"has '\udc00', half"),
        ({"image": "a.png", "caption": ["a", "\ud800"]}, r"has '\ud800', half"),
    ],
)
def test_unusable_records_are_errors(read: Any, images: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        read({"text": "fine"}, record).sample(1, RNG(0))
    assert str(error.value).startswith(f"{images / 'data.jsonl'}, line 2: ")
    assert message in str(error.value)


def test_a_key_that_is_right_is_not_corrected(read: Any) -> None:
    with pytest.raises(DataError, match="an image with caption and text") as error:
        read({"image": "a.png", "text": "a", "caption": "b"}).sample(0, RNG(0))
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "record", [{"text": "T"}, chat("Q"), chat([{"image": "a.png"}]), chat("<image>", images=["a.png"])]
)
def test_records_without_image_target_are_errors_for_task_draw(read: Any, record: Any) -> None:
    with pytest.raises(DataError, match="has no image target, and the source has task: draw"):
        read(record, task="draw").sample(0, RNG(0))
    read(record).sample(0, RNG(0))


def test_keys_without_effect(read: Any) -> None:
    more = dict.fromkeys(HARMLESS, "x")
    assert shape(read({"text": "T", **more}).sample(0, RNG(0))) == [("assistant", [("T", True)])]
    for record in ({"text": "T", "score": 3}, chat("Q", score=3), turn(score=3)):
        with pytest.raises(DataError, match=r"found the unknown keys 'score'.* the source's `ignore`"):
            read(record).sample(0, RNG(0))
        read(record, ignore=["score"]).sample(0, RNG(0))


def test_ignored_keys_resolve_ambiguity(read: Any) -> None:
    record = {"image": "a.png", "caption": "a", "class": "b"}
    assert shape(read(record, ignore=["class"], task="draw").sample(0, RNG(0)))[0] == ("user", [("a", False)])
    assert read(turn(weight=0.5), ignore=["weight"]).sample(0, RNG(0)).exact_supervision is False
    assert shape(read(chat("Q", image="")).sample(0, RNG(0)))[0] == ("user", [("Q", False)])


def test_markers_as_plain_text(read: Any) -> None:
    data = read({"text": "an <image> tag"}, chat("<image>"), markers="text")
    assert shape(data.sample(0, RNG(0))) == [("assistant", [("an <image> tag", True)])]
    assert shape(data.sample(1, RNG(0)))[0] == ("user", [("<image>", False)])


def test_no_path_leaves_the_folder(read: Any, images: Path) -> None:
    (images / "in").mkdir()
    (images / "in/link.png").symlink_to(images / "a.png")
    outside = [
        "../a.png",
        str(images / "a.png"),
        (images / "a.png").as_uri(),
        "file:///x/%2e%2e/a.png",
        "link.png",
    ]
    for path in outside:
        chats = chat("<image>", images=[path]), chat([{"type": "image_url", "image_url": {"url": path}}])
        for record in ({"image": path, "caption": "a"}, {"file_name": path, "text": "a"}, *chats):
            with pytest.raises(DataError, match="lies outside"):
                read(record, images=str(images / "in")).sample(0, RNG(0))


def test_data_uris_are_bounded(read: Any, monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    monkeypatch.setattr("janus_plugins.records.images.MAX_DATA_URI", 50)
    with pytest.raises(DataError, match=r"a data URI of \d+ characters; at most 50 are read"):
        read({"image": uri(images / "a.png"), "caption": "a"}).sample(0, RNG(0))


RECORDS = [{"text": "a [1, {2"}, {"text": 'quote " and \\'}, {"text": "ü", "metadata": [{"a": [1]}]}]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n  "])
def test_arrays_are_read_from_files_of_any_name(read: Any, name: str, indent: Any, before: str) -> None:
    data = read(raw=before + json.dumps(RECORDS, indent=indent, ensure_ascii=False) + "\n", name=name)
    assert [shape(data.sample(i, RNG(0)))[0][1] for i in range(len(data))] == [
        [(record["text"], True)] for record in RECORDS
    ]
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert shape(twin.sample(2, RNG(0))) == shape(data.sample(2, RNG(0)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("[]", "array without objects"),
        ("[1, 2]", "array without objects"),
        ('[1, {"text": "a"}]', "array without objects"),
        ('[{"text": "a"}, 7]', "line 1: not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "not JSON: expected , after"),
        ('[{"text": "a"},]', "line 1: not JSON"),
        ('[{"text": "a"}', "without an end; expected ]. Was"),
        ('[{"text": "a', "without an end"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "continues after its JSON array ends in line 1"),
        ('{\n"text": "a"\n}', "A file that does not begin with [ is read as a JSON object a line"),
        ('{"text": "a", "text": "b"}', "the key 'text' is there twice"),
        ('{"text": "a", "metadata": ' + "[" * 100_000, "not JSON: "),
        ('{"text": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_damaged_files_are_errors(read: Any, raw: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(raw=raw, name="data.json").sample(0, RNG(0))
    assert message in str(error.value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
CHAT = ["messages", "conversations", "role", "content", "from", "value", "system", "type", "weight"]
KEYS = st.sampled_from([*CHAT, "text", "image", "images", "caption", "file_name", "image_url", "url"])
ODD = st.recursive(
    PLAIN | st.sampled_from(["a.png", "<image>", "user", "assistant", "image", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=st.dictionaries(KEYS | st.text(), ODD, max_size=4))
def test_any_json_is_a_sample_or_a_data_error(read: Any, record: Any) -> None:
    data = read(record)
    try:
        data.sample(0, RNG(0))
    except DataError as error:
        if "line 1: " not in str(error):
            raise


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.dictionaries(st.text(), PLAIN, max_size=3), min_size=1, max_size=5),
    spaces=st.integers(0, 3),
)
def test_array_items_equal_json(read: Any, records: Any, spaces: int) -> None:
    data = read(raw=json.dumps(records, indent=spaces or None))
    assert [data.records[i] for i in range(len(data))] == records


def samples_of_the_page() -> list[Any]:
    blocks = re.findall(
        r"<!-- file: data/(\S+) -->\n```json\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S
    )
    assert len(blocks) == 10
    return [pytest.param(name, body, id=name) for name, body in blocks]


@pytest.mark.parametrize(("name", "body"), samples_of_the_page())
def test_reads_every_sample_of_the_documentation(images: Path, name: str, body: str) -> None:
    Image.new("RGB", (4, 3), "orange").save(images / "cat.png")
    (images / name).write_text(body, "utf-8")
    tasks = ("read", "draw") if name in ("captions.jsonl", "metadata.jsonl") else ("read",)
    for task in tasks:
        data = Jsonl(JsonlConfig(path=str(images / name), task=task))
        assert len(data) == body.count("\n{") + 1 if name.endswith("l") else 2
        for index in range(len(data)):
            sample = data.sample(index, RNG(0))
            assert "<image" not in str([s for m in sample.messages for s in m.content])
            assert len(str(sample.messages)) > 20


def test_the_page_lists_the_ignored_keys() -> None:
    section = PAGE.read_text("utf-8").partition("## Ignored keys\n")[2].partition("describe where")[0]
    assert tuple(re.findall(r"`(\w+)`", section)) == HARMLESS


def test_fingerprint_follows_the_bytes_of_the_file(read: Any) -> None:
    first, same, different = (
        read({"text": letter}, name=f"{i}.jsonl").fingerprint() for i, letter in enumerate("aab")
    )
    assert first == same != different


def test_null_counts_as_absent() -> None:
    fields = Fields({"a": None, "b": 1})
    assert "a" not in fields
    assert fields.take("a", "b") == 1
    fields.close()
