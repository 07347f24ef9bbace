"""Fixtures for every test: components come from our own pyproject, whatever else is installed.

And environments of their own, for those that try what is installed.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any
from zlib import crc32

import pytest
from hypothesis import settings

from janus_modular.plugins import EntryPointInfo, Plugins, set_default_plugins
from janus_modular.plugins.entry_points import GROUP

ROOT = Path(__file__).parents[1]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import onnxruntime themselves
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # `auto` is the processor here; `make test-gpu` shows a GPU

# Property tests: the same few examples in every run, and many new ones in `make proof`.
settings.register_profile("quick", max_examples=50, derandomize=True, database=None, deadline=None)
settings.register_profile("proof", max_examples=5_000, database=None, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


SLOWEST = (
    *("plugins/demo/test_ablation.py", "core/training/test_killed_ranks.py"),
    *("swapping/test_graphs.py", "plugins/test_contracts.py", "plugins/demo/test_thresholds.py"),
    *(
        "test_real_weights.py",
        "export/test_verify_layers.py",
        "export/test_families.py",
        "test_third_party_packages.py",
    ),
    *("export/test_path_of_other_graphs.py", "export/test_several_codes.py", "swapping/test_learning.py"),
    *("test_docs.py", "export/test_build_real_shapes.py", "export/test_export.py", "core/test_new_plugin.py"),
    *("core/server/test_ray.py", "core/server/test_load_generator.py"),
    "core/server/test_page_in_a_browser.py",
)
"""The files that take longest, from measured times: they go first, so that no worker waits for the other."""


OWN_EXPORTS = {
    *("flow_bundle", "several_codes_bundle", "drawing_bundle", "text_bundle", "bundled", "tiny_gpu_bundle"),
}
"""Fixtures that export a model for a few tests: 10 to 20 s each, so these tests are slow."""
TRACING = re.compile(r"(?:^test_|-)(?:exports|onnx_parity|drawing_graphs)\b")
"""Checks of a component that trace its graphs: seconds each, so they are slow."""
TRACED = re.compile(r"(?:\[(?:siglip|vq|mlp)-|TestHfBackbone::|TestMlpHead::|TestAutoregressiveGeneration::)")
"""The components that also `make test` traces: one of each slot."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark as slow what exports more than `make test` has time for."""
    traces = TRACING.search(item.name) and not TRACED.search(item.nodeid)
    if traces or OWN_EXPORTS & set(getattr(item, "fixturenames", ())):
        item.add_marker("slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; within a file, tests keep their order."""
    rank = {Path(__file__).parent / file: i for i, file in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking libraries and tests over and over: an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def shared_translations() -> Iterator[None]:
    """Read torch's translations to ONNX once in a process, not for every graph: 0.4 s each time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    build = cache(ONNXRegistry.from_torchlib)

    def copied(opset_version: int) -> ONNXRegistry:
        registry = copy(build(opset_version))
        registry.functions = {name: [*functions] for name, functions in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file on one worker, which shares their fixtures; but cut the longest in two.

    The rows of the graph matrix go by their first part, so that rows that share graphs stay together.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # by the number of tests; `SLOWEST` orders them by time

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            _, matrix, row = nodeid.partition("test_every_two_parts_are_the_same_as_graphs[")
            return f"{scope}-{crc32(row.partition('+')[0].encode()) % 2}" if matrix else scope

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def mutations() -> ModuleType:
    """The strategies that damage files, which tests of several folders use: `tests/mutations.py`."""
    spec = spec_from_file_location("mutations", Path(__file__).with_name("mutations.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def declared_components() -> tuple[EntryPointInfo, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return tuple(
        EntryPointInfo(match["slot"], name, module, project["name"], project["version"])
        for group, points in project["entry-points"].items()
        if (match := GROUP.fullmatch(group))
        for name, module in points.items()
    )


@pytest.fixture
def plugins() -> Plugins:
    """The components that pyproject.toml declares, none loaded yet."""
    return Plugins([*declared_components()])


@pytest.fixture(autouse=True)
def _own_plugins_only(plugins: Plugins) -> Iterator[None]:
    set_default_plugins(plugins)
    yield
    set_default_plugins(None)


KILLED = 42
"""The exit status of a process that `killed_at` killed."""

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

KilledAt = Callable[[int, Callable[[], object]], bool]


@pytest.fixture
def killed_at(tmp_path: Path) -> KilledAt:
    """Run an action in a process of its own that dies before its n-th file operation below ``tmp_path``.

    Return whether it died; False where it ended before. Nothing of it is cleaned up, as after SIGKILL:
    no ``finally``, no ``except``, no buffer that is written out.

    torch has one thread in it, and nothing of earlier tests is collected: both would wait for ever for
    threads, which a fork does not copy.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")

    def run(number: int, action: Callable[[], object]) -> bool:
        child = os.fork()
        if not child:
            gc.freeze()
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(1)
            _die_at(number, tmp_path)
            status = 1
            try:
                action()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED), f"the action failed by itself: {status}"
        return status == KILLED

    return run


def _die_at(number: int, folder: Path) -> None:
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES and not (event == "open" and args[2] & WRITES):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        if os.path.isabs(path) and not Path(path).is_relative_to(folder):
            return
        if count == number:
            os._exit(KILLED)
        count += 1

    sys.addaudithook(hook)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel once, by the backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@dataclass
class Environment:
    """A virtual environment without a way to this checkout."""

    folder: Path

    def install(self, *what: Path) -> None:
        """Install wheels or folders, from what is on this disk alone."""
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            self.folder / "bin/python",
        ]
        words = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        done = subprocess.run([*pip, *words, *what], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def run(self, where: Path, program: str, *args: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs in a folder, and expect it to succeed."""
        line = [str(self.folder / "bin" / program), *args]
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JANUS_"))
        }
        clean |= {"COLUMNS": "200", "NO_COLOR": "1"}
        done = subprocess.run(line, cwd=where, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="session")
def new_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    """Make environments with the wheel in them, that see our dependencies, but neither checkout nor us.

    Dependencies are links to those that the tests run with: all but what the editable install put there.
    """

    def create(name: str) -> Environment:
        folder = tmp_path_factory.mktemp(name)
        dependencies = folder / "dependencies"
        dependencies.mkdir()
        for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for one in Path(site).iterdir():
                if "janus" not in one.name.lower() and one.suffix != ".pth":
                    (dependencies / one.name).symlink_to(one)
        environment = Environment(folder / "env")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
        environment.install(wheel)
        (site,) = environment.folder.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(f"{dependencies}\n")
        return environment

    return create


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the command ``serve`` return at once, with a server in a thread; return the servers' addresses."""
    from janus_modular.server import run

    with ExitStack() as stack:
        started: list[str] = []

        def serve(service: Any, on_start: Callable[[str], None]) -> None:
            listener = stack.enter_context(run.listen("127.0.0.1", 0))
            server = run.make_server(service)
            thread = Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            started.append(run.address_of(listener))

        monkeypatch.setattr(run, "serve", serve)
        yield started
