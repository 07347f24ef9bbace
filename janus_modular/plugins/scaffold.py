"""Writes a new plugin, a distribution with one component, from the templates in this package.

It uses jinja2, which is installed anyway. A template tool such as copier would need git and a dozen packages,
for questions and updates that a plugin does not need.
"""

from __future__ import annotations

import keyword
import re
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from janus_modular.errors import PluginError
from janus_modular.plugins.catalogue import default_plugins
from janus_modular.registry import API_VERSION, SAMPLER_SETTINGS, SLOTS, a_component, slot_label
from janus_modular.suggest import did_you_mean

TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class ContractTest:
    """The contract and the example that test a template's component."""

    contract: str
    example: str  # returned by make(); {cls} is the component's class
    imports: str = "{cls}, {cls}Config"
    testing: str = ""  # further imports from janus_modular.testing
    examples: str = ""  # imports from janus_modular.testing.examples


PIXELS = "torch.rand(2, 3, 32, 32) * 2 - 1"
CONTRACT_TESTS = {
    "understanding_encoders": ContractTest("UnderstandingEncoderContract", "{cls}({cls}Config()), " + PIXELS),
    "image_tokenizers": ContractTest("ImageTokenizerContract", "{cls}({cls}Config()), " + PIXELS),
    "image_autoencoders": ContractTest("ImageAutoencoderContract", "{cls}({cls}Config()), " + PIXELS),
    "adaptors": ContractTest("AdaptorContract", "{cls}({cls}Config(), 8, 12), torch.rand(2, 2, 3, 8)"),
    "heads": ContractTest("HeadContract", "{cls}({cls}Config(), 8, (12,)), torch.rand(2, 3, 8)"),
    "backbones": ContractTest("BackboneContract", "{cls}({cls}Config()), torch.randint(320, (2, 7))"),
    "generation": ContractTest(
        "GenerationPathContract",
        "{cls}({cls}Config(), 16), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)",
    ),
    "text_samplers": ContractTest(
        "TextSamplerContract",
        "{package}, SamplingExample({cls}Settings(), [prompt(1, 2, 3), prompt(4)], NumpySession)",
        imports="{cls}Settings, {package}",
        testing="SamplingExample",
        examples="NumpySession, prompt",
    ),
    "image_samplers": ContractTest(
        "ImageSamplerContract",
        "{package}, SamplingExample({cls}Settings(), [prompt(1, 2, 3), prompt(4)], NumpySession)",
        imports="{cls}Settings, {package}",
        testing="SamplingExample",
        examples="NumpySession, prompt",
    ),
    "sources": ContractTest("SourceContract", "{cls}({cls}Config()), [0, 1]"),
    "objectives": ContractTest(
        "ObjectiveContract", "on_tiny_model({cls}, {cls}Config())", testing="on_tiny_model"
    ),
    "trackers": ContractTest(
        "TrackerContract", 'lambda folder: {cls}({cls}Config(), folder), {{"loss": 0.5}}'
    ),
    "formats": ContractTest(
        "CheckpointFormatContract",
        "{cls}({cls}Config()), CheckpointFormatExample(\n"
        '            {{"model_type": "{package}"}}, {{"{package}.backbone.weight": torch.rand(2, 3)}}\n'
        "        )",
        testing="CheckpointFormatExample",
    ),
    "schedulers": ContractTest("SchedulerContract", "{cls}({cls}Config()), 8"),
    "runtimes": ContractTest(
        "RuntimeContract",
        '{cls}({cls}Config(), Path("bundle")), [prompt(1, 2, 3), prompt(4)]',
        examples="prompt",
    ),
}
"""By slot; every slot has a template."""


def slot_named(word: str) -> str:
    """Return the slot that ``understanding-encoder`` or ``understanding_encoders`` names.

    Raises:
        PluginError: there is no such slot.
    """
    words = {slot_label(slot).replace(" ", "-"): slot for slot in SLOTS}
    slot = words.get(word) or word.replace("-", "_")
    if slot not in SLOTS:
        raise PluginError(
            f"there is no slot '{word}'. {did_you_mean(word, [*words, *SLOTS])}".rstrip()
            + f"\nSlots: {', '.join(words)}"
        )
    return slot


def write_plugin(name: str, slot: str, parent: Path) -> list[Path]:
    """Write the distribution ``name`` into ``parent/name``; return its files, relative to that folder.

    Raises:
        PluginError: the name is invalid or taken, or the folder exists.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    package = _package(name)
    if info := next((i for i in default_plugins().entry_points if (i.slot, i.name) == (slot, name)), None):
        raise PluginError(
            f"{info.origin} provides {a_component(slot)} called '{name}' already: choose another name"
        )
    folder = parent / name
    if folder.exists():
        raise PluginError(f"{folder} exists already: choose another name, or another --out")
    names = _names(name, slot, package)
    module = names["module"]
    targets = {
        "pyproject.toml.jinja": "pyproject.toml",
        "README.md.jinja": "README.md",
        "workflow.yml.jinja": ".github/workflows/test.yml",
        "test.py.jinja": f"tests/test_{package}.py",
        f"components/{slot}.py.jinja": f"src/{package}/{module}.py",
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # Python and TOML, not HTML; the name was checked
    )
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as temporary:
        written = {
            target: environment.get_template(source).render(names) for source, target in targets.items()
        }
        written[f"src/{package}/__init__.py"] = (
            f'"""{names["article"]} {names["label"]} for janus-modular."""\n'
        )
        for target, text in written.items():
            file = Path(temporary, "new", target)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
        Path(temporary, "new").rename(folder)
    return [Path(target) for target in sorted(written)]


def _names(name: str, slot: str, package: str) -> dict[str, object]:
    """Return the variables of the templates."""
    from janus_modular import __version__

    label = slot_label(slot)
    module = label.replace(" ", "_")
    cls = "".join(word.capitalize() for word in package.split("_"))
    test = CONTRACT_TESTS[slot]
    variables = {"cls": cls, "package": package}
    example = test.example.format(**variables)
    return {
        "name": name,
        "package": package,
        "module": module,
        "cls": cls,
        "slot": slot,
        "label": label,
        "article": "An" if label[0] in "aeiou" else "A",
        "api": API_VERSION,
        "version": __version__,
        "extra": "" if slot in (*SAMPLER_SETTINGS, "runtimes") else "[torch]",
        "checkable": slot not in ("formats", "runtimes"),
        "contract": test.contract,
        "example": example,
        "test_imports": _imports(test, example, f"from {package}.{module} import {test.imports}", variables),
    }


def _imports(test: ContractTest, example: str, own: str, variables: dict[str, str]) -> str:
    """Return the imports of a test: the standard library, third parties, the plugin itself."""
    contracts = ", ".join(sorted(filter(None, [test.contract, test.testing])))
    third_party = [
        "import torch" if "torch." in example else "",
        f"from janus_modular.testing import {contracts}",
        f"from janus_modular.testing.examples import {test.examples}" if test.examples else "",
    ]
    sections = ["from pathlib import Path"] if "Path(" in example else []
    return "\n\n".join([*sections, "\n".join(filter(None, third_party)), own.format(**variables)])


def _package(name: str) -> str:
    """Return the import name of a distribution.

    Raises:
        PluginError: the name is not valid, or a module with the import name is installed.
    """
    package = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(package):
        raise PluginError(
            f"'{name}' is not a valid plugin name: expected words of lower-case letters and digits,"
            " joined by hyphens, such as acme-dino"
        )
    if find_spec(package) is not None:
        raise PluginError(f"a module called '{package}' is installed already: choose another name")
    return package
