"""A server in a process of its own, its clients, and requests with the results that each has alone."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

FAULT = 1.25
"""A temperature at which the graph that samples raises an error."""

SYSTEM = "You are a helpful assistant who answers in one short sentence. "
"""The beginning of many questions: their prompts are read in chunks, and share rows' contents."""

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes that are forked from one that has only imported modules: they start in a second."""

PROCESSES.set_forkserver_preload(["torch", "janus_modular.server.run", "janus_plugins.backbones.hf"])


@dataclass(frozen=True)
class Model:
    """What is served."""

    name: str  # of its column
    path: Path
    runtime: Mapping[str, Any] | None  # of a bundle

    def load(self) -> Any:
        """Return a `janus_modular.Janus`."""
        from janus_modular import Janus

        return Janus.from_pretrained(self.path, device="cpu", runtime=self.runtime, allow_failed=True)


def make_tiny(checkpoint: Path, bundle: Path | None) -> None:
    """Save the tiny model with random weights where there is none yet, and export it."""
    process = PROCESSES.Process(target=_make_tiny, args=(checkpoint, bundle))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the tiny model was not made: exit status {process.exitcode}")


def _make_tiny(checkpoint: Path, bundle: Path | None) -> None:
    import torch

    from janus_modular.checkpoints import ModelAssembly, save
    from janus_modular.config import load, resolve
    from janus_modular.config.schema import ModelConfig

    if not checkpoint.exists():
        torch.manual_seed(0)
        assembly = ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig))
        for weight in assembly.model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)  # so that choices are clear
        save(assembly, checkpoint)
    if bundle is not None and not bundle.exists():
        from janus_export.config import ExportConfig
        from janus_export.onnx_export.export import export

        export(checkpoint, bundle, ExportConfig(variants=["fp32"]))


@dataclass(frozen=True)
class Case:
    """A request, as HTTP has it."""

    path: str
    body: Mapping[str, Any]
    jobs: int = 1  # that it is for the engine

    @property
    def is_stream(self) -> bool:
        """True if the answer comes in events."""
        return bool(self.body.get("stream"))


def cases(count: int) -> list[Case]:
    """Return answers and drawings: with images, guidance, several results, streaming and not."""
    image = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    shown = {"type": "image_url", "image_url": {"url": data_uri(Image.fromarray(image))}}
    made = []
    for i in range(count):
        stream = {"stream": True} if i // 4 % 2 else {}
        text = SYSTEM * (1 + i // 4 % 2) + f"Question {i}?"
        match i % 4:
            case 0 | 2:
                content = text if i % 4 == 0 else [shown, {"type": "text", "text": text}]
                messages = [{"role": "user", "content": content}]
                body = {
                    "messages": messages,
                    "max_tokens": 8 + i % 5,
                    "temperature": 1.0,
                    "seed": i,
                    **stream,
                }
                made.append(Case("/v1/chat/completions", body))
            case 1:
                more = {**stream, "partial_images": 2} if stream else {}
                made.append(Case("/v1/images/generations", {"prompt": f"image {i}", "seed": i, **more}))
            case _:
                sampled = {"guidance": 1.0 + i // 4 % 2, "temperature": 0.8}
                body = {"prompt": "a bird", "seed": i, "n": 1 + i // 4 % 3, **sampled, **stream}
                made.append(Case("/v1/images/generations", body))
    return made


def data_uri(image: Image.Image) -> str:
    """Return an image as an address."""
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def digest(image: Image.Image) -> str:
    """Return a hash of an image's pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def alone(model: Model, wanted: Iterable[Case]) -> list[Any]:
    """Return the result of each request without a server: a text, or hashes of images."""
    return in_process(_alone, model, list(wanted))


def _alone(results: Connection, model: Model, wanted: list[Case]) -> None:
    janus = model.load()
    for case in wanted:
        body = dict(case.body)
        settings = {name: body[name] for name in ("seed", "temperature", "guidance") if name in body}
        if "prompt" in body:
            drawn = janus.draw(body["prompt"], body.get("n", 1), batch_size=1, **settings)
            results.send([digest(image) for image in drawn])
            continue
        content, images = body["messages"][0]["content"], []
        if not isinstance(content, str):
            [shown, text] = content
            images = [base64.b64decode(shown["image_url"]["url"].partition(",")[2])]
            content = text["text"]
        results.send(str(janus.chat(content, images, max_tokens=body["max_tokens"], **settings)))


def in_process(function: Any, model: Model, wanted: list[Case]) -> list[Any]:
    """Run a function in a process of its own; return what it sends."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=function, args=(sender, model, wanted))
    process.start()
    sender.close()
    try:
        return [receiver.recv() for _ in wanted]
    finally:
        process.join()


class ServerProcess:
    """A server that can be killed. Its log is a file."""

    def __init__(self, model: Model, log: Path, *, file_bytes: int | None = None, **settings: Any) -> None:
        """Start it; ``file_bytes``: a limit on every file that it writes, as on a full disk."""
        receiver, sender = PROCESSES.Pipe(duplex=False)
        self.log = log
        self.process = PROCESSES.Process(
            target=_serve, args=(sender, model, str(log), file_bytes, settings), name=f"{model.name} server"
        )
        self.process.start()
        sender.close()
        try:
            self.address: str = receiver.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"the {self.process.name} ended at its start:\n{log.read_text()[-2000:]}"
            ) from None

    @property
    def memory(self) -> int:
        """The resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        """End it as the system does when memory runs out."""
        self.process.kill()
        self.process.join()

    def terminate(self) -> int | None:
        """End it as an operator does; return its exit status."""
        self.process.terminate()
        self.process.join(120)
        return self.process.exitcode


def _serve(
    pipe: Connection, model: Model, log: str, file_bytes: int | None, settings: dict[str, Any]
) -> None:
    from janus_modular.server.run import make_service, serve
    from janus_modular.server.settings import ServerConfig

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    janus = model.load()
    inject_error(janus.runtime)
    config = ServerConfig(port=0, name="tiny", rows=16, shutdown=100, **settings)
    service = make_service(janus, config, str(model.path), keys=())
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    serve(service, pipe.send)


def inject_error(runtime: Any) -> None:
    """Let graphs raise an error for one temperature."""
    open_session = runtime.open

    def opened(*arguments: Any, **options: Any) -> Any:
        session = open_session(*arguments, **options)
        run = session.run

        def faulty(name: str, *inputs: Any) -> Any:
            if any(isinstance(x, np.floating | float) and x == FAULT for x in inputs):
                raise RuntimeError("an injected fault")
            return run(name, *inputs)

        session.run = faulty
        return session

    runtime.open = opened


@dataclass
class Client:
    """Sends requests, and reads whole answers."""

    http: httpx.AsyncClient
    statuses: list[int] = field(default_factory=list)  # of all answers

    async def result(self, case: Case, request_id: str | None = None) -> Any:
        """Return the result of a request: a text, or hashes of images.

        Raises:
            ValueError: the answer is an error, or is not complete.
            httpx.HTTPError: the connection ended.
        """
        headers = {"x-request-id": request_id} if request_id else {}
        response = await self.http.post(case.path, json=case.body, headers=headers)
        self.statuses.append(response.status_code)
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {response.text[:200]}")
        return streamed(response.text) if case.is_stream else whole(response.json())

    async def metrics(self) -> dict[str, float]:
        """Return the server's metrics, by name with labels."""
        text = (await self.http.get("/metrics")).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[Client]:
    """Connect to a server of this machine."""
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits, trust_env=False) as http:
        yield Client(http)


def whole(body: Mapping[str, Any]) -> Any:
    """Return the result in an answer."""
    if "data" in body:
        return [digest(decoded(item["b64_json"])) for item in body["data"]]
    return body["choices"][0]["message"]["content"]


def streamed(text: str) -> Any:
    """Return the result in the events of a stream.

    Raises:
        ValueError: the stream has an error, or not exactly one end.
    """
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    if any("error" in event for event in parsed):
        raise ValueError(f"an error in a stream: {text[-300:]}")
    images = {
        event["image_index"]: digest(decoded(event["b64_json"]))
        for event in parsed
        if event.get("type") == "image_generation.completed"
    }
    completed = len(re.findall("^event: image_generation.completed$", text, re.MULTILINE))
    if images and completed == len(images):
        return [images[index] for index in sorted(images)]
    if completed or events.count("[DONE]") != 1:
        raise ValueError(f"a stream without its end, or with two: {text[-300:]}")
    choices = [choice for event in parsed for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def decoded(b64_json: str) -> Image.Image:
    """Return an image of an answer."""
    return Image.open(BytesIO(base64.b64decode(b64_json)))


async def gathered(tasks: Iterable[Any]) -> list[Any]:
    """Wait for all; return results and errors."""
    return await asyncio.gather(*tasks, return_exceptions=True)


def bad_bodies() -> list[tuple[bytes, int]]:
    """Return bodies of a chat, each with the status that refuses it."""

    def chat_body(*content: Any, **fields: Any) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": list(content)}], **fields}).encode()

    def image_part(file: bytes) -> dict[str, Any]:
        url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    return [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"\xff\xfe", 400),
        (chat_body(unknown=1), 400),
        (chat_body({"type": "text", "text": 3}), 400),
        (chat_body({"type": "text", "text": "a" * 150_000}), 400),
        (chat_body({"type": "text", "text": "a"}, temperature=-1), 400),
        (chat_body({"type": "text", "text": "a"}, max_tokens="many"), 400),
        (chat_body(image_part(b"no image")), 400),
        (chat_body(image_part(bomb(30_000, 30_000))), 400),
        (chat_body(image_part(bomb(4_000, 4_000)[:500])), 400),
        (b" " * 25_000_000, 413),
    ]


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG file of a large black image."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(width // 8 + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
