"""A component whose package is not installed: an error of ours, with the part and the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from janus_modular import ComponentConfig, ComponentSpec, MissingExtraError
from janus_modular.errors import JanusError, MissingPackageError
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.registry import Entry

WHO = "the backbone 'packed' of acme 1.0 needs "


def raising(error: ImportError) -> Callable[[Any], Any]:
    def factory(config: Any) -> Any:
        raise error

    return factory


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            ModuleNotFoundError("No module named 'torchao'", name="torchao"),
            MissingPackageError,
            "the package 'torchao', which is not installed: pip install torchao",
        ),
        (
            ModuleNotFoundError("No module named 'a.b'", name="a.b"),
            MissingPackageError,
            "the package 'a', which is not installed: pip install a",
        ),
        (
            ImportError("Using `bitsandbytes` requires bitsandbytes: `pip install -U bitsandbytes`\nmore"),
            MissingPackageError,
            "a package that cannot be imported: Using `bitsandbytes` requires bitsandbytes: "
            "`pip install -U bitsandbytes`",
        ),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), MissingExtraError, "the extra 'lora'"),
    ],
)
def test_a_factory_that_lacks_a_package(error: ImportError, kind: type[JanusError], said: str) -> None:
    entry = Entry("packed", raising(error), ComponentConfig, "acme 1.0", "backbones")
    with pytest.raises(kind) as caught:
        entry.make(ComponentConfig(), build=lambda part: part)
    assert str(caught.value).startswith(WHO + said)


def test_an_attention_that_is_not_installed(plugins: Plugins) -> None:
    options = plugins.entry("backbones", "hf").config
    sizes = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    part = ComponentSpec("backbones", "hf", options(config=sizes, attention="flash_attention_2"))
    with pytest.raises(MissingPackageError, match=r"the backbone 'hf' of janus-modular .* needs a package"):
        ModelBuilder(plugins)(part)
