"""Dockerfile and Kubernetes manifest: linters accept them, and their settings are the server's."""

from __future__ import annotations

import json
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


HELM = ROOT / ".cache/helm/bin/python"
RENDER = """
import json, sys
import helm_python

chart, values = sys.argv[1], json.loads(sys.argv[2])
with helm_python.Chart.load(chart) as loaded:
    loaded.validate_schema(values)
    files = loaded.render(values, name="janus", namespace="default")
print(json.dumps({"lint": helm_python.lint(chart), "files": files}))
"""


def rendered(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Render the chart by Helm's own library, which is no package of the environment."""
    if not (HELM.parents[1] / "installed").exists():
        pytest.skip("needs Helm's library: make .cache/helm/installed")
    line = [HELM, "-c", RENDER, str(ROOT / "deploy/helm"), json.dumps(values)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def manifests_of_the_chart(values: dict[str, Any]) -> list[dict[str, Any]]:
    done = rendered(values)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [message for message in result["lint"]["messages"] if message["severity"] > 1] == []
    texts = [text for name, text in result["files"].items() if name.endswith(".yaml")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


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


@pytest.mark.slow
def test_the_chart_gives_the_manifests_by_default():
    def by_kind(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {manifest["kind"]: manifest for manifest in manifests}

    assert by_kind(manifests_of_the_chart({})) == by_kind(MANIFESTS)


@pytest.mark.slow
def test_kubernetes_accepts_the_chart_with_all_values():
    import kubernetes_validate

    from janus_modular.config import load, resolve

    values = {
        "autoscaling": {"enabled": True},
        "model": {"path": "bundles/demo"},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "settings": {"name": "a: b", "hosts": ["a.example"], "limits": {"images": 2}, "fetch_images": True},
        "shutdown": 60,
        "traces": "http://collector:4318",
    }
    manifests = manifests_of_the_chart(values)
    assert {manifest["kind"] for manifest in manifests} == {
        *(manifest["kind"] for manifest in MANIFESTS),
        "HorizontalPodAutoscaler",
    }
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    [deployment] = [manifest for manifest in manifests if manifest["kind"] == "Deployment"]
    assert "replicas" not in deployment["spec"]
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 60
    config = resolve(load("serve/local", pod["containers"][0]["args"]), ServerConfig)
    assert (config.name, config.hosts, config.limits.images) == ("a: b", ["a.example"], 2)
    assert (config.fetch_images, config.traces, config.shutdown, config.rows) == (True, True, 60, 8)


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"replicas": 0}, {"replica": 2}, {"traces": "collector"}])
def test_the_chart_refuses_what_it_does_not_know(values: dict[str, Any]):
    done = rendered(values)
    assert done.returncode != 0
    assert next(iter(values)) in done.stderr


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
