"""A chat in Gradio's form as messages of OpenAI's API."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def messages_of(history: Sequence[Mapping[str, Any]], question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a chat as messages of OpenAI's API, with its images as data.

    ``history`` is in Gradio's form, ``question`` has a ``text`` and ``files``.
    """
    messages: list[dict[str, Any]] = []
    for message in history:
        parts = [*_parts(message["content"])]
        is_continued = messages and messages[-1]["role"] == message["role"]
        if is_continued:  # Gradio keeps the files of a message apart from its text
            messages[-1]["content"] += parts
        else:
            messages.append({"role": message["role"], "content": parts})
    images = [_image_part(path) for path in question.get("files") or ()]
    text = question.get("text") or ""
    messages.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
    return messages


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a message of Gradio: a text, a file, or a list of such."""
    if isinstance(content, str):
        yield {"type": "text", "text": content}
    elif isinstance(content, list | tuple):
        for part in content:
            yield from _parts(part)
    elif isinstance(content, Mapping) and content.get("type") == "text":
        yield {"type": "text", "text": content["text"]}
    elif isinstance(content, Mapping):
        file = content.get("file", content)
        yield _image_part(file["path"])


def _image_part(path: str | Path) -> dict[str, Any]:
    mime = mimetypes.guess_type(str(path))[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{data}"}}
