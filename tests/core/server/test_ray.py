"""Replicas in a Ray cluster on this machine: by OpenAI's client, by Ray's handle, and when one is killed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from janus_modular.janus import Janus

PYTHON = Path(__file__).parents[3] / ".cache/ray/bin/python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PYTHON.parents[1] / "installed").exists(),
        reason="needs the environment of Ray: make .cache/ray/installed",
    ),
]

ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # replicas as important as the test that waits for them
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",  # a machine with other work is slow, not broken
}


@dataclass
class Cluster:
    """A server in a Ray cluster of its own."""

    address: str
    environment: dict[str, str]
    process: int

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="0123456789abcdef", **options)

    def replicas(self) -> list[int]:
        """Return the processes of replicas, which Ray names so."""
        return [pid for pid in descendants(self.process) if command(pid).startswith("ray::ServeReplica")]


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except FileNotFoundError:  # it has ended
        return ""


@pytest.fixture(scope="module")
def cluster(tiny_janus: Janus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One replica, and a second under load."""
    folder = tmp_path_factory.mktemp("ray")
    tiny_janus.save_pretrained(folder / "tiny")
    (folder / "keys").write_text("0123456789abcdef")
    temporary = tempfile.mkdtemp(prefix="ray-")  # short: paths of sockets are limited
    environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": temporary, "PYTHONUNBUFFERED": "1"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    line = [PYTHON, "-m", "janus_modular", "serve", folder / "tiny", "--ray", "--port", str(port)]
    line += ["--api-keys", folder / "keys", "rows=2", "ray.max_replicas=2", "ray.target=1", "ray.cpus=0.5"]
    line += ["ray.upscale_delay=0"]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        printed = []
        try:
            for text in process.stdout:
                printed.append(text)
                if address := re.search(r"(http://\S+)/v1 \(Ctrl-C stops\)", text):
                    with ThreadPoolExecutor(1) as pool:  # so that the pipe never fills
                        pool.submit(printed.extend, process.stdout)
                        yield Cluster(address[1], environment, process.pid)
                        process.send_signal(signal.SIGTERM)
                    break
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            shutil.rmtree(temporary)
    assert process.returncode == 0, "".join(printed)


def decoded(b64_json: str) -> bytes:
    return Image.open(BytesIO(base64.b64decode(b64_json))).tobytes()


def test_a_client_gets_what_one_process_gives(cluster: Cluster, tiny_janus: Janus):
    [expected] = tiny_janus.draw("a cat", 1, guidance=2, seed=5)
    messages: list[Any] = [{"role": "user", "content": "what?"}]
    with cluster.client() as client:
        chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        events = client.images.generate(
            prompt="a cat", stream=True, partial_images=2, extra_body={"guidance": 2, "seed": 5}
        )
        *partial, last = events
    assert chat.choices[0].message.content == "".join(pieces) == tiny_janus.chat("what?", max_tokens=9)
    assert len([piece for piece in pieces if piece]) > 1
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert decoded(last.b64_json) == expected.tobytes()


def test_keys_are_checked_behind_the_proxy(cluster: Cluster):
    with (
        cluster.client().with_options(api_key="another") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


BY_HANDLE = """
import json, ray
from ray import serve
from janus_modular.serving import AnswerRequest, DrawRequest, PartialImage, TextDelta

ray.init(address="auto", logging_level="error")
handle = serve.get_app_handle("janus").options(stream=True)
answer = [*handle.submit.remote(AnswerRequest("what?", max_new_tokens=9))]
drawing = [*handle.submit.remote(DrawRequest("a cat", guidance=2, seed=5, partial_images=2))]
print(json.dumps({
    "texts": [event.text for event in answer if isinstance(event, TextDelta)],
    "answer": str(answer[-1].result),
    "partial": sum(isinstance(event, PartialImage) for event in drawing),
    "image": drawing[-1].result[0].tobytes().hex(),
}))
"""


def test_a_handle_in_the_cluster_streams_the_same(cluster: Cluster, tiny_janus: Janus):
    line = [PYTHON, "-c", BY_HANDLE]
    done = subprocess.run(line, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    [expected] = tiny_janus.draw("a cat", 1, guidance=2, seed=5)
    assert got["answer"] == tiny_janus.chat("what?", max_tokens=9)
    assert "".join(got["texts"]).strip() == got["answer"].strip()
    assert got["partial"] == 2
    assert bytes.fromhex(got["image"]) == expected.tobytes()


def test_replicas_are_added_under_load_and_a_killed_one_loses_nothing_silently(
    cluster: Cluster, tiny_janus: Janus
):
    """Every request ends with its image or an error, streams too; clients that try again get the image."""
    [expected] = [image.tobytes() for image in tiny_janus.draw("a cat", 1, guidance=2, seed=5)]
    killed = Event()
    drawing: dict[str, Any] = {"prompt": "a cat", "extra_body": {"guidance": 2, "seed": 5}}

    def whole(client: openai.OpenAI) -> str:
        return client.images.generate(**drawing).data[0].b64_json

    def streamed(client: openai.OpenAI) -> str:
        *_, last = client.images.generate(**drawing, stream=True, partial_images=2)
        assert last.type == "image_generation.completed", "a stream ended as if it were complete"
        return last.b64_json

    def ask_until_killed(draw: Callable[[openai.OpenAI], str], retries: int) -> list[bytes | Exception]:
        outcomes: list[bytes | Exception] = []
        with cluster.client(max_retries=retries) as client:
            done_after = 0
            while done_after < 3:  # requests that began after the kill
                done_after += killed.is_set()
                try:
                    outcomes.append(decoded(draw(client)))
                except (openai.InternalServerError, openai.APIConnectionError, httpx.TransportError) as error:
                    outcomes.append(error)
        return outcomes

    with cluster.client() as client, ThreadPoolExecutor(6) as pool:
        work = [
            pool.submit(ask_until_killed, draw, retries)
            for draw in (whole, streamed)
            for retries in (0, 0, 8)
        ]
        try:
            while len(replicas := cluster.replicas()) < 2:
                assert not any(task.done() for task in work)
                client.models.list()
            os.kill(replicas[0], signal.SIGKILL)
        finally:
            killed.set()
        results = [task.result() for task in work]
    images = [outcome for outcomes in results for outcome in outcomes if isinstance(outcome, bytes)]
    assert images
    assert {*images} == {expected}
    assert all(isinstance(outcome, bytes) for outcome in results[2])  # the whole images, with retries
