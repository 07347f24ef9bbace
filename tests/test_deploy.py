"""Dockerfile and Kubernetes manifest: linters accept them, and their settings are the server's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from janus_modular.server.settings import ServerConfig

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy/Dockerfile"
MANIFESTS: list[dict[str, Any]] = [*yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text("utf-8"))]


@pytest.fixture
def pod() -> dict[str, Any]:
    [deployment] = [manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment"]
    return deployment["spec"]["template"]["spec"]


def test_hadolint_accepts_the_dockerfile():
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_kubernetes_accepts_the_manifests(manifest: dict[str, Any]):
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(manifest, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**manifest, "speck": {}}, version, strict=True)


def test_the_image_has_the_extras_of_a_server():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for extras in re.findall(r"EXTRAS=([a-z,]*[a-z])", DOCKERFILE.read_text("utf-8")):
        assert "serve" in extras.split(",")
        assert set(extras.split(",")) <= set(declared)


def test_probes_ports_and_times_are_those_of_the_server(pod: dict[str, Any], tiny_paths: set[str]):
    [container] = pod["containers"]
    [port] = container["ports"]
    assert port["containerPort"] == ServerConfig().port
    assert f"EXPOSE {ServerConfig().port}" in DOCKERFILE.read_text("utf-8")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in tiny_paths
    assert pod["terminationGracePeriodSeconds"] > ServerConfig().shutdown
    assert f"useradd --uid {pod['securityContext']['runAsUser']} " in DOCKERFILE.read_text("utf-8")


def test_the_arguments_of_the_container_are_settings(pod: dict[str, Any]):
    from janus_modular.config import load, resolve

    [container] = pod["containers"]
    assert resolve(load("serve/local", container["args"]), ServerConfig).rows == 8


@pytest.fixture
def tiny_paths() -> set[str]:
    """The paths that a server answers."""
    from fastapi.routing import APIRoute

    from janus_modular.server.status_routes import status_router

    router = status_router(None)  # type: ignore[arg-type]
    return {route.path for route in router.routes if isinstance(route, APIRoute)}
