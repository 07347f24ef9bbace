"""What pytest is told where janus-modular is installed: one marker, and when the two processes end.

It is imported by every run of pytest, whoever's: it imports pytest and nothing else.
"""

from __future__ import annotations

import sys

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of checks that take long: engines, two processes."""
    config.addinivalue_line("markers", "slow: takes long; leave out with -m 'not slow'")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the two processes that checked sharding, if they were started."""
    sharding = sys.modules.get("janus_modular.testing.sharding")
    if sharding is not None:
        sharding.close_pair()
