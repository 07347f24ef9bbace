"""Limits of a server: errors before anything is computed, deadlines, and cancelled connections."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import zlib
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from PIL import Image

from janus_modular.errors import QueueFullError, RequestCancelledError
from janus_modular.server.settings import LimitsConfig
from janus_modular.serving import Job

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"


def post(address: str, body: Any, path: str = CHAT, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.post(
            address + path, content=content, headers={"content-type": "application/json", **headers}
        )


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return {"status": response.status_code, **body}


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims to have so many pixels, in a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def asking(url: str, count: int = 1) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}] * count
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}


def uri(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def tiff() -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "missing_required_parameter"),
        (b"[]", "invalid_value"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_body"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_prompt"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "invalid_value"),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}", "invalid_body"),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 4000 + b"}", "invalid_value"),
    ],
)
def test_bodies_that_are_not_valid_json(served: Any, body: bytes, code: str):
    found = error(post(served.address, body))
    assert (found["status"], found["code"]) == (400, code)
    assert len(found["message"]) < 400


def test_a_page_of_another_site_cannot_send_requests(served: Any):
    """Browsers send text/plain to other sites without asking them, and a name may resolve to any address."""
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert post(served.address, body).status_code == 200
    plain = post(served.address, body, **{"content-type": "text/plain"})
    assert (plain.status_code, plain.json()["error"]["code"]) == (400, "invalid_value")
    named = post(served.address, body, host="evil.example")
    assert (named.status_code, named.json()["error"]["code"]) == (400, "invalid_host")
    assert (
        "access-control-allow-origin" not in post(served.address, body, origin="http://evil.example").headers
    )


@pytest.mark.parametrize(
    ("url", "code", "text"),
    [
        (uri(png_header(50_000, 50_000)), "invalid_image", "too large to be read safely"),
        (uri(png_header(5_000, 5_000)), "invalid_image", "at most 16,777,216"),
        (uri(png_header(100, 100)), "invalid_image", "damaged"),
        (uri(b"\x89PNG\r\n\x1a\n"), "invalid_image", "image"),
        (uri(tiff()), "invalid_image", "expected PNG, JPEG, WEBP, GIF"),
        (uri(b"%!PS-Adobe"), "invalid_image", "expected PNG"),
        ("data:image/png;base64,@@@@", "invalid_image", "base64"),
        ("data:image/svg+xml;base64,AAAA", "invalid_image", "expected data:image/png"),
        ("file:///etc/passwd", "invalid_image", "expected data:image/png"),
        ("http://127.0.0.1/a.png", "image_address_refused", "fetches no addresses"),
    ],
)
def test_images_that_are_too_large_damaged_or_elsewhere(served: Any, url: str, code: str, text: str):
    found = error(post(served.address, asking(url)))
    assert (found["status"], found["code"]) == (400, code)
    assert text in found["message"]


def test_the_limits_of_a_request_are_settings(start: Any):
    limits = LimitsConfig(body=10_000, prompt=20, images=1, n=2, pixels=100)
    address = start(limits=limits).address
    image = BytesIO()
    Image.new("RGB", (11, 10)).save(image, "PNG")
    assert "at most 100" in error(post(address, asking(uri(image.getvalue()))))["message"]
    assert "takes 1 at most" in error(post(address, asking("data:", 2)))["message"]
    assert error(post(address, {"prompt": "a" * 21}, IMAGES))["code"] == "limit_exceeded"
    assert error(post(address, {"prompt": "a", "n": 3}, IMAGES))["code"] == "limit_exceeded"
    large = error(post(address, b" " * 10_001))
    assert (large["status"], large["code"]) == (413, "body_too_large")


def test_a_body_of_unknown_length_is_read_up_to_the_limit(start: Any):
    served = start(limits=LimitsConfig(body=100_000))
    with httpx.Client(trust_env=False) as client:
        chunks = (b" " * 1000 for _ in range(1000))
        headers = {"content-type": "application/json"}
        response = client.post(served.address + CHAT, content=chunks, headers=headers)
    assert error(response)["code"] == "body_too_large"


def test_a_body_that_does_not_come_is_not_waited_for(start: Any):
    served = start(limits=LimitsConfig(body_time=0.05))
    target = urlsplit(served.address)
    connection = HTTPConnection(target.hostname or "", target.port, timeout=60)
    connection.putrequest("POST", CHAT)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "10")
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 408
    assert json.loads(answer.read())["error"]["code"] == "body_too_slow"
    connection.close()


def test_a_full_queue_is_an_error_with_the_time_to_wait(served: Any, monkeypatch: pytest.MonkeyPatch):
    submitted: list[Job] = []
    submit = served.service.engine.submit

    def full(request: Any) -> Job:
        if submitted:
            raise QueueFullError("found 64 requests waiting; expected fewer.", 3.0)
        submitted.append(submit(request))
        return submitted[0]

    monkeypatch.setattr(served.service.engine, "submit", full)
    body = {"messages": [{"role": "user", "content": "a"}], "n": 2, "max_tokens": 400}
    response = post(served.address, body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert error(response)["code"] == "queue_full"
    with pytest.raises(RequestCancelledError):  # the first of the two is not left behind
        submitted[0].result(60)
    with served.client() as client, pytest.raises(openai.RateLimitError):
        client.images.generate(prompt="a")


def test_more_answers_than_the_queue_takes_are_not_to_be_tried_again(start: Any):
    address = start(queue=2).address
    body = {"messages": [{"role": "user", "content": "a"}], "n": 3, "max_tokens": 1}
    response = post(address, body)
    assert response.status_code == 400
    assert error(response)["message"] == "n: 3 answers; this server's queue takes 2 at most."
    assert post(address, {**body, "n": 2}).status_code == 200


def test_a_drawing_that_the_journal_cannot_take_is_refused_for_now(start: Any, tmp_path: Path):
    folder = tmp_path / "journal"
    address = start(journal=str(folder)).address
    assert post(address, {"prompt": "a"}, IMAGES).status_code == 200
    folder.rename(tmp_path / "gone")
    response = post(address, {"prompt": "a"}, IMAGES)
    assert (response.status_code, response.headers["retry-after"]) == (503, "30")
    assert error(response)["code"] == "journal_unavailable"
    assert str(tmp_path) not in response.text
    answer = post(address, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
    assert answer.status_code == 200


def test_the_deadline_ends_a_request(start: Any):
    served = start(deadline=1e-6)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 400}
    response = post(served.address, body)
    assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
    streamed = post(served.address, {**body, "stream": True})
    assert "deadline_exceeded" in streamed.text.splitlines()[-2]
    with served.client() as client, pytest.raises(openai.APIError, match="deadline"):
        [*client.chat.completions.create(model="tiny", messages=body["messages"], stream=True)]


@pytest.mark.parametrize("path", [CHAT, IMAGES])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_rows(
    start: Any, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
):
    """Of much work, so that it is not done before."""
    served = start(limits=LimitsConfig(n=400))
    submitted: list[Job] = []
    has_work, submit = threading.Event(), served.service.engine.submit

    def submit_noted(request: Any) -> Job:
        submitted.append(submit(request))
        has_work.set()
        return submitted[-1]

    monkeypatch.setattr(served.service.engine, "submit", submit_noted)
    work = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 500, "n": 50, "temperature": 1}
    body = {"prompt": "a", "n": 400} if path == IMAGES else work
    content = json.dumps({"stream": stream, **body}).encode()
    target = urlsplit(served.address)
    with socket.create_connection((target.hostname, target.port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        assert has_work.wait(60)
    with pytest.raises(RequestCancelledError):
        submitted[0].result(60)
    assert post(served.address, {"prompt": "a"}, IMAGES).status_code == 200
    stats = served.service.engine.stats()
    assert stats.answer_rows == stats.draw_rows == stats.waiting == stats.answered == 0


def test_a_failure_inside_is_a_500_without_details(start: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    served = start()

    def broken(request: Any) -> Job:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(served.service.engine, "submit", broken)
    response = post(served.address, {"prompt": "a"}, IMAGES)
    assert (response.status_code, error(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert response.headers["connection"] == "close"  # the next request needs another connection


@pytest.mark.parametrize(("path", "method", "status"), [("/v2", "GET", 404), (CHAT, "GET", 405)])
def test_unknown_paths_and_methods(served: Any, path: str, method: str, status: int):
    response = httpx.request(method, served.address + path, trust_env=False)
    assert error(response)["status"] == status
