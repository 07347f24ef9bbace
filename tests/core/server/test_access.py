"""Access to a server: API keys and hosts, its log, and the addresses of images that it fetches."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from janus_modular.errors import ConfigError, ImageError
from janus_modular.server import image_addresses
from janus_modular.server.image_addresses import fetch_image, is_public
from janus_modular.server.settings import KEYS_VARIABLE, LimitsConfig, ServerConfig, read_keys
from janus_modular.serving import Engine

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"


def test_keys_open_the_api_and_nothing_else_does(start: Any, tmp_path: Path):
    keys = tmp_path / "keys.txt"
    keys.write_text(f"# two services\n{KEY}\n\n{OTHER}\n")
    served = start(api_keys=str(keys))
    for key in (KEY, OTHER):
        with served.client(key) as client:
            assert client.models.list().data[0].id == "tiny"
    for key in ("sk-0123456789abcdeF", KEY[:-1], f"{KEY} {OTHER}", "é"):
        answer = httpx.get(
            f"{served.address}/v1/models",
            headers={"Authorization": f"Bearer {key}".encode()},
            trust_env=False,
        )
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    with served.client("no") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.images.generate(prompt="a")
    assert caught.value.code == "invalid_api_key"
    for path in ("health", "ready", "metrics", "openapi.json"):
        assert httpx.get(f"{served.address}/{path}", trust_env=False).status_code in (200, 503)
    described = httpx.get(f"{served.address}/openapi.json", trust_env=False).json()
    assert described["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("short", {}, "API key 1 of .*16 or more"),
        (f"{KEY}\nwith a space in it", {}, "API key 2"),
        ("# none", {}, "no API keys"),
        (None, {"host": "0.0.0.0"}, "allow_anonymous"),
        (None, {"host": "example.org"}, "allow_anonymous"),
        (None, {"api_keys": "missing.txt"}, "missing.txt"),
    ],
)
def test_keys_that_cannot_be_used(text: str | None, config: dict[str, Any], message: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "keys.txt").write_text(text)
        config = {**config, "api_keys": str(tmp_path / "keys.txt")}
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(ServerConfig(**config), {})
    assert "with a space" not in str(caught.value)


def test_keys_from_the_environment():
    assert read_keys(ServerConfig(), {KEYS_VARIABLE: f"{KEY}, {OTHER}"}) == [KEY, OTHER]
    assert read_keys(ServerConfig(), {}) == []
    assert read_keys(ServerConfig(host="0.0.0.0", allow_anonymous=True), {}) == []
    with pytest.raises(ConfigError, match="holds no API keys"):
        read_keys(ServerConfig(), {KEYS_VARIABLE: " "})


def test_the_log_has_a_line_of_each_request_and_nothing_of_its_content(
    start: Any, tmp_path: Path, caplog: Any
):
    keys = tmp_path / "keys.txt"
    keys.write_text(KEY)
    served = start(api_keys=str(keys))
    secret = "the prompt is a secret"
    with caplog.at_level(logging.DEBUG), served.client(KEY) as client:
        client.images.generate(prompt=secret, user="unit-7", extra_headers={"x-request-id": "mine-1"})
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt=secret, size=secret)
    lines = [
        json.loads(record.message) for record in caplog.records if record.name == "janus_modular.requests"
    ]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v1/images/generations", s) for s in (200, 400)
    ]
    assert (lines[0]["request_id"], lines[0]["user"], lines[0]["mode"]) == ("mine-1", "unit-7", "draw")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("janus_modular")]
    assert not any(secret in text or KEY in text for text in ours)


def test_metrics_have_vllms_names(served: Any):
    from prometheus_client.parser import text_string_to_metric_families

    with served.client() as client:
        images = client.images.generate(prompt="a", n=2)
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=3
        )
    text = httpx.get(f"{served.address}/metrics", trust_env=False).text
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["vllm:num_requests_running",] == samples["vllm:num_requests_waiting",] == 0
    assert samples["vllm:kv_cache_usage_perc",] == 0
    assert samples["janus_rows", "free"] == 8
    assert samples["janus_tokens_total", "answer"] == 3
    assert samples["janus_tokens_total", "draw"] == images.usage.output_tokens
    assert samples["vllm:generation_tokens_total",] == 3 + images.usage.output_tokens
    for name in ("janus_first_token_seconds_count", "janus_time_per_token_seconds_count"):
        assert (samples[name, "answer"], samples[name, "draw"]) == (1, 1)


def test_a_server_is_healthy_before_it_is_ready(start: Any, monkeypatch: pytest.MonkeyPatch):
    submit, warm = Engine.submit, threading.Event()

    def submit_later(engine: Engine, request: Any) -> Any:
        warm.wait(60)
        return submit(engine, request)

    monkeypatch.setattr(Engine, "submit", submit_later)
    served = start(warm_up=True)
    health, ready = (httpx.get(f"{served.address}/{path}", trust_env=False) for path in ("health", "ready"))
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert (ready.status_code, ready.json()) == (503, {"status": "starting"})
    warm.set()
    while (ready := httpx.get(f"{served.address}/ready", trust_env=False)).status_code != 200:
        assert ready.json() == {"status": "starting"}
    assert ready.json() == {"status": "ready"}
    for path in ("health", "ready", "metrics"):
        head = httpx.head(f"{served.address}/{path}", trust_env=False)
        assert (head.status_code, head.content) == (200, b"")


def test_a_server_whose_engine_has_stopped_is_not_healthy(start: Any):
    served = start()
    served.service.engine.close()
    health = httpx.get(f"{served.address}/health", trust_env=False)
    assert (health.status_code, health.json()) == (503, {"status": "failed"})
    with served.client() as client, pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="a")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("::7f00:1", False),
    ],
)
def test_public_addresses(address: str, public: bool):
    assert is_public(ip_address(address)) is public


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/a.png", "not on the public Internet"),
        ("http://localhost:9/a.png", "not on the public Internet"),
        ("http://2130706433/a.png", "not on the public Internet"),
        ("http://[::1]/a.png", "not on the public Internet"),
        ("http://[::ffff:10.0.0.1]/a.png", "not on the public Internet"),
        ("https://user:word@example.org/a.png", "without a user name"),
        ("http://a b/", "valid http"),
        ("http://example.org:0/", "valid http"),
        ("http://[::1/", "valid http"),
        ("gopher://example.org/", "valid http"),
    ],
)
def test_addresses_that_are_not_fetched(url: str, message: str):
    with pytest.raises(ImageError, match=message):
        fetch_image(url, max_bytes=1000)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web site under a public name, which is resolved here and at this port alone."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/private":
                self.send_response(302)
                self.send_header("location", "http://127.0.0.1:9/")
            elif self.path.startswith("/loop"):
                self.send_response(302)
                self.send_header("location", f"/loop{self.path}")
            else:
                self.send_response(404 if self.path == "/missing" else 200)
            self.end_headers()
            self.wfile.write(f"{self.headers['host']} {self.path}".encode())

        def log_message(self, *_: Any) -> None:
            pass

    resolve = image_addresses.public_address
    with HTTPServer(("127.0.0.1", 0), Pages) as server:
        monkeypatch.setattr(
            image_addresses,
            "public_address",
            lambda host, port: "127.0.0.1" if host == "site.example" else resolve(host, port),
        )
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://site.example:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_address_is_fetched_from_where_it_was_checked(site: str):
    assert fetch_image(f"{site}/a?b=c", max_bytes=100) == f"{site[7:]} /a?b=c".encode()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/private", "'127.0.0.1' is not on the public"),
        ("/loop", "more than 3 redirects"),
        ("/missing", "status 404"),
        ("/" + "a" * 1000, "more than 100 bytes"),
    ],
)
def test_what_an_address_may_not_do(site: str, path: str, message: str):
    with pytest.raises(ImageError, match=message):
        fetch_image(site + path, max_bytes=100)


def test_an_address_that_takes_too_long_is_given_up(site: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_addresses, "TIME", 0.0)
    with pytest.raises(ImageError, match=r"took more than 0 seconds"):
        fetch_image(site, max_bytes=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70_000}, "port"),
        ({"rows": 0}, "rows"),
        ({"queue": 0}, "queue"),
        ({"deadline": float("nan")}, "deadline"),
        ({"deadline": 0.0}, "deadline"),
        ({"shutdown": -1.0}, "shutdown"),
        ({"name": " "}, "name"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}: "):
        ServerConfig(**settings)


@pytest.mark.parametrize("name", ["body", "body_time", "prompt", "pixels", "n", "images"])
def test_limits_out_of_range(name: str):
    with pytest.raises(ValueError, match=f"^{name}: "):
        LimitsConfig(**{name: -1})


def test_hosts_that_a_server_answers_to():
    assert "*" not in ServerConfig().accepted_hosts
    assert ServerConfig(host="::1").is_local
    assert ServerConfig(host="0.0.0.0").accepted_hosts == ["*"]
    assert ServerConfig(hosts=["api.example"]).accepted_hosts == ["api.example"]
