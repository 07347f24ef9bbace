"""Hypothesis strategies that damage valid files: bytes that are edited, JSON values that become others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")

NUMBERS = [0, -1, 1, 3, 2**31, 2**63, 2**64, 10**18, -(10**18), 10**40, 0.5, float("inf"), float("nan")]
TEXTS = ["", "\0", "../../x", "x" * 5000, "${", "${a", "{{", "é\u2028", "😀", "[bold]", "1e999", "null"]


def read_or_refused(read: Callable[[], T], error: type[Exception], name: str) -> T | None:
    """Return what ``read`` returns, None after an ``error`` whose text names the input; raise all else."""
    try:
        return read()
    except error as refusal:
        text = str(refusal)
    assert name in text
    assert len(text) < 5000
    return None


def deep(levels: int = 2000) -> Any:
    """Return lists in lists, deeper than Python recurses."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def values() -> st.SearchStrategy[Any]:
    """Draw any JSON value, the awkward ones often."""
    leaves = st.one_of(
        st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers()
    )
    return st.one_of(
        leaves,
        st.lists(leaves, max_size=3),
        st.dictionaries(st.sampled_from(["name", "a", "0", "", "content"]), leaves, max_size=2),
    )


@st.composite
def damaged_json(draw: st.DrawFn, whole: Any) -> Any:
    """Draw ``whole`` with up to three of its values replaced, left out, or put under another key."""
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        here = tree
        while True:
            keys: list[Any] = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(here[key], dict | list) and here[key] and draw(st.integers(0, 4)):
                here = here[key]
                continue
            edit = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
            if edit == "replace":
                here[key] = draw(values())
            else:
                value = here.pop(key)
                if edit == "rename" and isinstance(here, dict):
                    here[draw(st.sampled_from([*TEXTS, "Weights", "0"]))] = value
            break
    return tree


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw ``whole`` after up to four edits: bits flipped, parts cut out, repeated or overwritten."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        # A file's head and tail say what lies where; there most edits should fall.
        size = len(content)
        at = draw(st.one_of(st.integers(0, min(64, size)), st.integers(max(0, size - 64), size)))
        at = draw(st.one_of(st.just(at), st.integers(0, size)))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(["flip", "cut", "truncate", "insert", "overwrite", "repeat"])):
            case "flip" if at < size:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at : at + length]
            case "truncate":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "overwrite":
                content[at : at + length] = draw(st.sampled_from([b"\0", b"\xff", b"[", b'"'])) * length
            case "repeat":
                content[at:at] = content[at : at + length]
    return bytes(content)
