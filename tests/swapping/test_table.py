"""The table of components is complete, its rules are correct, and its rows cover all pairs."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from types import ModuleType

import pytest
import yaml

from janus_modular import ConfigError, Plugins
from janus_plugins.understanding_encoders.hf_vision import FAMILIES


def test_every_built_in_part_is_in_the_table(table: ModuleType, plugins: Plugins):
    """Every component that pyproject.toml declares for these slots is in the table."""
    for dimension, (_, slot) in table.PLACES.items():
        said = [yaml.safe_load(option.words) for option in table.TABLES[dimension].values()]
        tried = {one["name"] if isinstance(one, dict) else one for one in said}
        missing = set(plugins.names(slot)) - tried - table.PATHS_OF_OTHER_PARTS
        assert not missing, f"{slot}: add {sorted(missing)} to tests/swapping/conftest.py, a line each"


def test_every_family_of_vision_models_is_in_the_table(table: ModuleType):
    said = [yaml.safe_load(option.words) for option in table.ENCODERS.values()]
    tried = {one["config"]["model_type"] for one in said if one["name"] == "hf-vision"}
    assert not FAMILIES.keys() - tried, "add them to tests/swapping/conftest.py, a line each"


def test_every_two_parts_that_fit_meet_in_a_row(table: ModuleType):
    rows = [asdict(row).items() for row in table.ROWS]
    assert not [pair for pair in table.pairs() if not any(pair.items() <= row for row in rows)]
    assert not [row for row in table.ROWS if table.broken(asdict(row))]


def test_a_rule_leaves_out_nothing_but_what_is_refused(table: ModuleType, plugins: Plugins):
    """Else it could hide a combination that ought to work."""
    for rule in table.RULES:
        names = table.dimensions_of(rule)
        every = [
            dict(zip(names, one, strict=True)) for one in product(*(table.TABLES[name] for name in names))
        ]
        left_out = [labels for labels in every if rule in table.broken(labels)]
        assert left_out, f"{rule.__name__} leaves nothing out"
        for labels in left_out:
            with pytest.raises(ConfigError):
                table.Row(**{"encoder": "vit", **labels}).build(plugins)
