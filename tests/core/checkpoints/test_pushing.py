"""Uploading to a stand-in for the hub: a server on this machine, called by huggingface_hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from janus_modular import CheckpointError
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.checkpoints.pushing import push
from janus_modular.cli.app import app
from janus_modular.weights.checksums import FILE


class Hub(ThreadingHTTPServer):
    """Keeps the files of commits, and of git-lfs, as the hub's HTTP interface takes them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.branches: list[str] = []
        self.files: dict[tuple[str, str], bytes] = {}  # (branch, path)
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        if "wrong" in (self.headers.get("Authorization") or ""):
            return self.reply({"error": "Invalid credentials"}, 401)
        if self.path == "/api/validate-yaml":  # of the model card
            return self.reply({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            sent = json.loads(body)
            name = f"{sent['organization']}/{sent['name']}"
            hub.repositories[name] = sent
            return self.reply({"url": f"{hub.url}/{name}"})
        branch = self.path.rpartition("/")[2]
        if "/branch/" in self.path:
            hub.branches.append(branch)
            return self.reply({})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.reply({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{hub.url}/objects/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        assert "/commit/" in self.path, self.path
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[branch, value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                hub.files[branch, value["path"]] = hub.objects[value["oid"]]
        return self.reply({"commitUrl": f"{hub.url}/user/mine/commit/1", "commitOid": "1", "success": True})

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.reply({})

    def do_GET(self) -> None:
        self.reply({"id": "user/mine", "sha": "0", "siblings": [], "tags": [], "xetEnabled": False})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # plain git-lfs
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(make: Callable[..., ModelAssembly], tmp_path: Path) -> Path:
    save(make(), tmp_path / "mine", training={"step": 3, "config": {"learn": ["backbone"]}})
    return tmp_path / "mine"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of how huggingface_hub calls httpx
@pytest.mark.parametrize("revision", [None, "trial"])
def test_the_hub_gets_every_file_as_it_is(hub: Hub, folder: Path, revision: str | None) -> None:
    arguments = ["push", str(folder), "user/mine", "--private"]
    result = CliRunner().invoke(app, arguments + (["--revision", revision] if revision else []))
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith("/user/mine/commit/1")
    created = hub.repositories["user/mine"]  # by the key of the newer interface, or of the older
    assert created.get("visibility") == "private" or created.get("private") is True
    branch = revision or "main"
    assert hub.files == {(branch, path.name): path.read_bytes() for path in folder.iterdir()}
    assert hub.branches == ([revision] if revision else [])
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_damaged_checkpoint_is_not_uploaded(hub: Hub, folder: Path) -> None:
    [weights] = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"its hash is not that in {FILE}"):
        push(folder, "user/mine")
    assert not hub.repositories


def test_a_checkpoint_of_a_run_is_not_uploaded(hub: Hub, folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / "training.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected a model: push RUN/model"):
        push(folder, "user/mine")
    assert not hub.repositories


def test_an_error_of_the_hub_says_what_to_check(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match=r"user/mine on the hub: .*Is the token valid"):
        push(folder, "user/mine")
    with pytest.raises(CheckpointError, match=r"found 'mine'; expected .* USER/NAME"):
        push(folder, "mine")
