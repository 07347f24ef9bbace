"""The extras: what each installs, and install commands of pages, errors and templates."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from janus_modular.errors import EXTRAS, INCLUDES

ROOT = Path(__file__).parents[1]
DECLARED: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
CODE = ("janus_modular", "plugins/janus_plugins", "export/janus_export")
MODULES = {
    "scikit-learn": "sklearn",
    "cuda-bindings": "cuda.bindings",
    "onnxruntime-gpu": "onnxruntime",
    "mlflow-skinny": "mlflow",
    "opentelemetry-sdk": "opentelemetry.sdk",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
}
"""By distribution, where it is not the same name with underscores."""


def requirements(extra: str) -> tuple[set[str], set[str]]:
    """Return the distributions that an extra adds by itself, and the other extras that it includes."""
    own: set[str] = set()
    included: set[str] = set()
    for one in DECLARED[extra]:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", one).groups()
        if name == "janus-modular":
            included |= set(extras.split(","))
        else:
            own.add(name)
    return own, included


def installs(extra: str) -> set[str]:
    """Return all that an extra installs of ours."""
    own, included = requirements(extra)
    return own.union(*map(installs, included))


def test_errors_know_what_each_extra_adds_and_includes():
    def modules(extra: str) -> set[str]:
        return {MODULES.get(name, name.replace("-", "_")) for name in requirements(extra)[0]}

    assert {extra: set(names) for extra, names in EXTRAS.items()} == {
        extra: modules(extra) for extra in EXTRAS
    }
    included = {extra: requirements(extra)[1] for extra in EXTRAS}
    assert {extra: included[extra] for extra in EXTRAS if included[extra]} == {
        extra: set(names) for extra, names in INCLUDES.items()
    }


def test_developers_get_onnx_runtime_for_cpus_and_a_server_no_torch():
    assert {"onnxruntime", "torch", "onnx", "tensorrt-rtx"} <= installs("dev")
    assert not {"torch", "transformers", "onnx"} & (installs("runtime") | installs("gpu") | installs("rtx"))
    assert not {"onnxruntime", "onnxruntime-gpu"} & installs("export")


def install_lines() -> dict[str, list[str]]:
    """Every list of our extras that pages, errors and templates tell people to install, and where."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *(ROOT / "docs").rglob("*.md")]
    for package in CODE:
        files += [*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.jinja")]
    found: dict[str, list[str]] = {}
    for file in files:
        for extras in re.findall(r"janus-modular\[([a-z,]+)\]", file.read_text("utf-8")):
            found.setdefault(extras, []).append(str(file.relative_to(ROOT)))
    return found


def test_no_documented_install_command_installs_two_builds_of_onnx_runtime():
    lines = [*install_lines(), *DECLARED]
    assert {"runtime", "gpu", "export,gpu"} <= set(lines)
    for line in lines:
        brought = set[str]().union(*(installs(extra) for extra in line.split(",")))
        assert not {"onnxruntime", "onnxruntime-gpu"} <= brought, (line, install_lines().get(line))


def test_every_extra_is_in_the_table_of_the_installation_page():
    text = (ROOT / "docs/how-to/install.md").read_text("utf-8")
    table = text.partition("| extra | adds |")[2].partition("\n\n")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert rows == set(DECLARED)
