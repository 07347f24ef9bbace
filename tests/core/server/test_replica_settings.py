"""Settings of replicas, and what is refused before a cluster starts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.errors import ConfigError
from janus_modular.server.settings import ServerConfig


def test_replicas_are_set_on_the_command_line():
    config = resolve(load("serve/local", ["ray.max_replicas=3", "ray.target=2"]), ServerConfig)
    assert config.ray is not None
    assert (config.ray.min_replicas, config.ray.max_replicas, config.ray.target) == (1, 3, 2)
    assert resolve(load("serve/local", []), ServerConfig).ray is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ray.min_replicas=0", "min_replicas: 0; expected 1"),
        ("ray.min_replicas=2", "max_replicas: 1; expected at least min_replicas, 2"),
        ("ray.target=0", "target: 0"),
        ("ray.cpus=-1", "cpus: -1"),
        ("ray.replicas=2", "replicas"),
    ],
)
def test_settings_that_no_cluster_has_are_errors(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve(load("serve/local", [override]), ServerConfig)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_a_missing_ray_names_its_extra():
    done: Any = CliRunner().invoke(app, ["serve", "no-model", "--ray"])
    assert "janus-modular[ray" in str(done.exception) + done.output
