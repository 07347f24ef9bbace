"""Writes a new plugin: a whole distribution of one component, from the templates in this package.

Plain jinja2, which is installed anyway: a template tool such as copier wants git and a dozen packages, to ask
questions and to update what it wrote; here is nothing to ask, and what is written is the author's.
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
class Tested:
    """How a template's component is tested."""

    contract: str
    example: str  # what make() returns; {cls} is the component's class
    imports: str = "{cls}, {cls}Config"
    testing: str = ""  # what is imported from janus_modular.testing, beside the contract
    examples: str = ""  # what is imported from janus_modular.testing.examples


PIXELS = "torch.rand(2, 3, 32, 32) * 2 - 1"
TESTED = {
    "understanding_encoders": Tested("UnderstandingEncoderContract", "{cls}({cls}Config()), " + PIXELS),
    "image_tokenizers": Tested("ImageTokenizerContract", "{cls}({cls}Config()), " + PIXELS),
    "adaptors": Tested("AdaptorContract", "{cls}({cls}Config(), 8, 12), torch.rand(2, 2, 3, 8)"),
    "heads": Tested("HeadContract", "{cls}({cls}Config(), 8, (12,)), torch.rand(2, 3, 8)"),
    "backbones": Tested("BackboneContract", "{cls}({cls}Config()), torch.randint(320, (2, 7))"),
    "generation": Tested(
        "GenerationPathContract",
        "{cls}({cls}Config(), 16), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)",
    ),
    "text_samplers": Tested(
        "TextSamplerContract",
        "{package}, SamplingExample({cls}Settings(), [prompt(1, 2, 3), prompt(4)], NumpySession)",
        imports="{cls}Settings, {package}",
        testing="SamplingExample",
        examples="NumpySession, prompt",
    ),
    "image_samplers": Tested(
        "ImageSamplerContract",
        "{package}, SamplingExample({cls}Settings(), [prompt(1, 2, 3), prompt(4)], NumpySession)",
        imports="{cls}Settings, {package}",
        testing="SamplingExample",
        examples="NumpySession, prompt",
    ),
    "sources": Tested("SourceContract", "{cls}({cls}Config()), [0, 1]"),
    "trackers": Tested("TrackerContract", 'lambda folder: {cls}({cls}Config(), folder), {{"loss": 0.5}}'),
    "formats": Tested(
        "CheckpointFormatContract",
        "{cls}({cls}Config()), CheckpointFormatExample(\n"
        '            {{"model_type": "{package}"}}, {{"{package}.backbone.weight": torch.rand(2, 3)}}\n'
        "        )",
        testing="CheckpointFormatExample",
    ),
    "runtimes": Tested(
        "RuntimeContract",
        '{cls}({cls}Config(), Path("bundle")), [prompt(1, 2, 3), prompt(4)]',
        examples="prompt",
    ),
}
"""By slot; every slot has a template."""


def slot_named(word: str) -> str:
    """Return the slot that ``understanding-encoder``, ``understanding_encoders`` and the like mean.

    Raises:
        PluginError: no slot is called so.
    """
    words = {slot_label(slot).replace(" ", "-"): slot for slot in SLOTS}
    found = words.get(word) or (word.replace("-", "_") if word.replace("-", "_") in SLOTS else None)
    if found is None:
        raise PluginError(
            f"there is no slot '{word}'. {did_you_mean(word, words)}\nSlots: {', '.join(words)}"
        )
    return found


def write_plugin(name: str, slot: str, parent: Path) -> list[Path]:
    """Write the distribution ``name`` into ``parent/name``; return its files, relative to that.

    Raises:
        PluginError: the name is no good, the slot has it, or the folder is there already.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    package = _package(name)
    if taken := [one for one in default_plugins().entry_points if (one.slot, one.name) == (slot, name)]:
        raise PluginError(
            f"{taken[0].origin} offers {a_component(slot)} called '{name}' already: choose another name"
        )
    folder = parent / name
    if folder.exists():
        raise PluginError(f"{folder} is there already: choose another name, or another --out")
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
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as aside:
        written = {
            target: environment.get_template(source).render(names) for source, target in targets.items()
        }
        written[f"src/{package}/__init__.py"] = (
            f'"""{names["article"]} {names["label"]} for janus-modular."""\n'
        )
        for target, text in written.items():
            file = Path(aside, "new", target)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
        Path(aside, "new").rename(folder)
    return [Path(target) for target in sorted(written)]


def _names(name: str, slot: str, package: str) -> dict[str, object]:
    """Return what templates write of a name."""
    from janus_modular import __version__

    label = slot_label(slot)
    module = label.replace(" ", "_")
    cls = "".join(word.capitalize() for word in package.split("_"))
    tested = TESTED[slot]
    inside = {"cls": cls, "package": package}
    example = tested.example.format(**inside)
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
        "contract": tested.contract,
        "example": example,
        "test_imports": _imports(tested, example, f"from {package}.{module} import {tested.imports}", inside),
    }


def _imports(tested: Tested, example: str, own: str, inside: dict[str, str]) -> str:
    """Return the imports of a test: the standard library's, other people's, the plugin's own."""
    contracts = ", ".join(sorted(filter(None, [tested.contract, tested.testing])))
    others = [
        "import torch" if "torch." in example else "",
        f"from janus_modular.testing import {contracts}",
        f"from janus_modular.testing.examples import {tested.examples}" if tested.examples else "",
    ]
    sections = ["from pathlib import Path"] if "Path(" in example else []
    return "\n\n".join([*sections, "\n".join(filter(None, others)), own.format(**inside)])


def _package(name: str) -> str:
    """Return the import name of a distribution's name, which nobody else has here.

    Raises:
        PluginError: it is no name of a distribution, or its import name is taken.
    """
    package = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(package):
        raise PluginError(
            f"'{name}' is no name of a plugin: small letters and digits, in words joined by hyphens, "
            "such as acme-dino"
        )
    if find_spec(package) is not None:
        raise PluginError(f"a module called '{package}' is installed already: choose another name")
    return package
