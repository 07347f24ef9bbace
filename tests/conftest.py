"""Fixtures for every test: components come from our own pyproject, whatever else is installed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from janus_modular.plugins import Announcement, Plugins, set_default_plugins
from janus_modular.plugins.announcements import GROUP

ROOT = Path(__file__).parents[1]


def announced() -> list[Announcement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [
        Announcement(match["slot"], name, module, project["name"], project["version"])
        for group, points in project["entry-points"].items()
        if (match := GROUP.fullmatch(group))
        for name, module in points.items()
    ]


@pytest.fixture
def plugins() -> Plugins:
    """The components that our pyproject announces, nothing loaded yet."""
    return Plugins(announced())


@pytest.fixture(autouse=True)
def _own_plugins_only(plugins: Plugins) -> Iterator[None]:
    set_default_plugins(plugins)
    yield
    set_default_plugins(None)
