"""Mixtures in shares of tokens, compared with the tokens counted in batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from janus_modular import ConfigError, DataError
from janus_modular.plugins import default_plugins
from janus_modular.training.initial_model import initial_model
from janus_modular.training.mixture import Mixture, MixturePhase
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.token_mixture import mean_lengths, mixed_by_tokens

from .conftest import Make
from .test_bad_samples import Records, builder


def sources(**lengths: int) -> dict[str, Records]:
    return {name: Records(**{f"at{i}": length for i in range(10)}) for name, length in lengths.items()}


def mixed(records: dict[str, Records], shares: dict[str, float], steps: int = 50, **options: Any) -> Any:
    plain = replace(
        builder(Records(), **options), mixture=Mixture(records, [MixturePhase(shares)], 20, seed=0)
    )
    return mixed_by_tokens(plain, [MixturePhase(shares)], steps)


def test_tokens_of_each_source_meet_their_shares() -> None:
    """Lengths 2, 4 and 8 with shares 1, 1 and 2 of the tokens: 2, 1 and 1 of four samples."""
    make = mixed(sources(a=2, b=4, c=8), {"a": 1.0, "b": 1.0, "c": 2.0})
    tokens: dict[str, int] = {}
    for step in range(50):
        for name, count in make.build(step).tokens.items():
            tokens[name] = tokens.get(name, 0) + count
    assert tokens == {"a": 1000, "b": 1000, "c": 2000}


def test_samples_that_cannot_be_used_are_not_measured() -> None:
    records = {"a": Records(at0=DataError("bad"), at1=OSError("bad"), at2=6)}
    make = replace(builder(Records()), mixture=Mixture(records, [MixturePhase({"a": 1.0})], 10, 0))
    assert mean_lengths(make) == {"a": (6 + 7 * 4) / 8}
    assert mean_lengths(make, workers=2) == mean_lengths(make, workers=2, worker_type="process")
    none = {"a": Records(**{f"at{i}": DataError("bad") for i in range(10)})}
    with pytest.raises(DataError, match=r"source 'a': none of the first 10 samples .*data check"):
        mixed(none, {"a": 1.0})


def test_a_share_without_a_sample_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"mixture.b: its share .* no sample, of 8 on average, in 2 steps"):
        mixed(sources(a=2, b=8), {"a": 99.0, "b": 1.0}, steps=2)


def test_a_run_by_tokens(make: Make) -> None:
    """Images count with their positions; another length of rows leaves the order of samples as it is."""
    plugins = default_plugins()

    def refs(**changes: Any) -> list[Any]:
        config = make(mixture={"read": 1, "draw": 1, "text": 2}, mixture_unit="tokens", **changes)
        assembly = initial_model(config, plugins, "meta")
        built = batch_builder(config, open_sources(config, plugins), assembly.model, assembly.processor)
        assert built.mixture.samples_before(40)["text"] > 40  # of 200: texts are shorter than images
        return [built.mixture.sample_refs(step) for step in range(40)]

    assert refs() == refs(length=200, bad_samples__too_long="cut")
