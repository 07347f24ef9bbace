"""Calls a server of OpenAI's API, in streams."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from janus_modular.errors import ServingError
from janus_modular.foreign import printable, reason

CONNECT_SECONDS = 10.0


class ApiClient:
    """A server, by its address (``http://127.0.0.1:8000``) and maybe an API key."""

    def __init__(self, address: str, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # the server has a deadline
        base = address.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(base_url=base, headers=headers, timeout=timeout, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def model(self) -> dict[str, Any]:
        """Return the description of the served model.

        Raises:
            ServingError: the server does not answer, or refuses.
        """
        with _reported():
            response = self._client.get("/v1/models")
            _check(response)
            models = response.json()["data"]
        description: dict[str, Any] = models[0]
        return description

    def chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Iterator[str]:
        """Yield the answer so far, each time that it grows.

        Raises:
            ServingError: the server does not answer, or refuses.
        """
        text = ""
        for event in self._events("/v1/chat/completions", {"messages": messages, **fields}):
            for choice in event["choices"]:
                text += choice["delta"].get("content", "")
            yield text

    def draw(self, prompt: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Yield the events of a drawing: partial images, and at the end the images.

        Raises:
            ServingError: the server does not answer, or refuses.
        """
        return self._events("/v1/images/generations", {"prompt": prompt, **fields})

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        content = {name: value for name, value in body.items() if value is not None} | {"stream": True}
        with _reported(), self._client.stream("POST", path, json=content) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
            _check(response)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ServingError(event["error"]["message"])
                yield event


class _reported:  # noqa: N801 - a context manager, without a frame of its own in generators
    """Turns failures of the connection into errors that name the server."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, error_class: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, httpx.HTTPError | KeyError | IndexError | ValueError):
            raise ServingError(
                f"the server does not answer as one of OpenAI's API: {reason(error)}. Check its address, and"
                " that it runs: janus-modular serve MODEL"
            ) from error


def _check(response: httpx.Response) -> None:
    if response.status_code == httpx.codes.OK:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}"
    raise ServingError(f"the server refused: {printable(message, most=1000)}")
