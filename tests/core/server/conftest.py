"""A tiny model behind a real server on a free port of this machine, and the official client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import openai
import pytest
import torch

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.server.run import address_of, listen, make_server, make_service
from janus_modular.server.service import Service
from janus_modular.server.settings import ServerConfig


@dataclass
class Served:
    """A service, and where it answers."""

    service: Service
    address: str  # without a slash at its end

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """Return the official client, which tries once."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=api_key, max_retries=0)


Start = Callable[..., Served]


@pytest.fixture(scope="session")
def tiny_janus() -> Janus:
    """configs/model/tiny with weights so large that choices are clear."""
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig))
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return Janus.of(assembly)


@contextmanager
def running(janus: Janus, config: ServerConfig) -> Iterator[Served]:
    """Serve a model in threads of this process."""
    service = make_service(janus, config, "models/tiny")
    with listen("127.0.0.1", 0) as listener:
        server = make_server(service)
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Served(service, address_of(listener))
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serving() -> Callable[[Janus, ServerConfig], AbstractContextManager[Served]]:
    """`running`, for other files."""
    return running


@pytest.fixture(scope="module")
def served(tiny_janus: Janus) -> Iterator[Served]:
    """One server for the tests of a file that change nothing."""
    with running(tiny_janus, ServerConfig()) as started:
        yield started


@pytest.fixture
def start(tiny_janus: Janus) -> Iterator[Start]:
    """Start servers with settings of their own; they end with the test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            running(tiny_janus, ServerConfig(**{"warm_up": False, **settings}))
        )


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    """The official client of `served`."""
    with served.client() as connected:
        yield connected


PAGE_PYTHON = Path(__file__).parents[3] / ".cache/page/bin/python"
"""Python of an environment with the extra ``ui``, whose Gradio needs an older Pillow than other tests."""

OpenPage = Callable[[str], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def page_python() -> Path:
    """`PAGE_PYTHON`, where `make` has made it."""
    if not (PAGE_PYTHON.parents[1] / "installed").exists():
        pytest.skip("needs the environment of the web page: make .cache/page/installed")
    return PAGE_PYTHON


def restore_interrupts() -> None:
    """Take SIGINT as by default: a shell's background process ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def open_page(page_python: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenPage:
    """Run ``janus-modular ui`` on a model or a server until the block ends; yields the page's address.

    At the end no copy of an image that was shown or uploaded is left.
    """

    @contextmanager
    def opened(model: str) -> Iterator[str]:
        line = [page_python, "-m", "janus_modular", "ui", model, "--port", "0"]
        files = tmp_path_factory.mktemp("page")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(files)}
        with subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            preexec_fn=restore_interrupts,
        ) as process:
            assert process.stdout is not None
            printed = []
            try:
                for text in process.stdout:
                    printed.append(text)
                    if address := re.search(r"Running on.* (http://127\.0\.0\.1:\d+)", text):
                        yield address[1]
                        break
            finally:
                process.send_signal(signal.SIGINT)
                printed.append(process.communicate(timeout=60)[0])
            assert any("Running on" in text for text in printed), "".join(printed)
        assert [*files.glob("janus-page-*")] == []
        assert [*files.rglob("*.png")] == []

    return opened
