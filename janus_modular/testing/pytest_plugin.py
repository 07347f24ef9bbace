"""The pytest plugin of janus-modular: it registers a marker and ends the processes of the sharding check.

Every run of pytest in the environment imports it, so it imports nothing but pytest.
"""

from __future__ import annotations

import sys

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of slow checks: engines, two processes."""
    config.addinivalue_line("markers", "slow: takes long; deselect with -m 'not slow'")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the processes of the sharding check, if they were started."""
    sharding = sys.modules.get("janus_modular.testing.sharding")
    if sharding is not None:
        sharding.close_pair()
