"""Generation paths that each violate one rule: the check that fails, whatever the graphs' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import ComponentConfig, EncodedSpec, GraphSpec, TensorSpec, sample_with_noise
from janus_modular.testing import checks_of, run_check

LEVELS, SIDE, WIDTH = 6, 2, 5


@dataclass
class PathConfig(ComponentConfig):
    """Nothing to choose."""


class Path(nn.Module):
    """An image of 8 x 8 pixels as the grey of 2 x 2 patches; its subclasses each break one promise."""

    predicts_next, image_sampler = True, "autoregressive"
    frozen_submodules: tuple[str, ...] = ()
    height = width = 8
    num_tokens = SIDE**2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PathConfig()
        self.sizes: Mapping[str, int] = {"codes": LEVELS}
        self.embedding = nn.Embedding(LEVELS, WIDTH)
        self.head = nn.Linear(WIDTH, LEVELS)

    @torch.no_grad()
    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator] = ()) -> Any:
        grey = F.avg_pool2d(pixels.float().mean(1, keepdim=True), 4).flatten(1)
        return (grey / 255 * (LEVELS - 1)).round().long()

    def embed(self, targets: Any) -> Tensor:
        return self.embedding(targets)

    def losses(self, hidden: Tensor, targets: Any) -> Mapping[str, Tensor]:
        logits = self.head(hidden).float()
        return {"image": F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")}

    def sample_image(self, hidden: Tensor, noise: Tensor, guidance: Tensor, temperature: Tensor) -> Any:
        logits = self.head(hidden).float().unflatten(0, (-1, noise.shape[0]))
        codes = sample_with_noise((logits[-1] + guidance * (logits[0] - logits[-1])) / temperature, noise)
        return codes, self.embedding(codes).repeat(logits.shape[0], 1)

    def decode_image(self, codes: Tensor) -> Tensor:
        grey = (codes.float() / (LEVELS - 1) * 255).unflatten(1, (1, SIDE, SIDE))
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1).to(torch.uint8)

    def tokenize_image(self, pixels: Tensor) -> Tensor:
        return Path.targets(self, pixels)

    def graphs(self) -> list[GraphSpec]:
        pixels = TensorSpec("pixels", "uint8", ("images", 3, 8, 8))
        codes = TensorSpec("codes", "int64", ("images", SIDE**2))
        choice = (
            TensorSpec("hidden", "model", ("rows", WIDTH)),
            TensorSpec("noise", "float32", ("images", LEVELS)),
            TensorSpec("guidance", "float32", ()),
            TensorSpec("temperature", "float32", ()),
        )
        chosen = TensorSpec("codes", "int64", ("images",)), TensorSpec("x", "model", ("rows", WIDTH))
        return [
            GraphSpec("sample_image", self.sample_image, choice, chosen, "sample"),
            GraphSpec("decode_image", self.decode_image, (codes,), (pixels,), "decode"),
            GraphSpec("tokenize_image", self.tokenize_image, (pixels,), (codes,), "encode"),
        ]


class NamedLikeOthers(Path):
    """A path whose helpers are called as methods of a tokenizer, a backbone, a head and an adaptor are."""

    codebooks = (LEVELS,)

    def encode(self, words: str) -> str:
        return words.upper()

    def logits(self, x: Tensor) -> Tensor:
        return x


class DictTargets(Path):
    """Targets are named tensors."""

    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator] = ()) -> dict[str, Tensor]:
        return {"codes": super().targets(pixels), "mean": pixels.float().mean((1, 2, 3))}

    def embed(self, targets: dict[str, Tensor]) -> Tensor:
        shade = targets["mean"].to(self.embedding.weight.dtype)[:, None, None] / 255
        return self.embedding(targets["codes"]) + shade

    def losses(self, hidden: Tensor, targets: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return super().losses(hidden, targets["codes"])


class Nested(Path):
    """What is trained apart lies deeper than one step."""

    frozen_submodules = ("tokenizer.inner",)

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = nn.ModuleDict({"inner": nn.Linear(2, 2)})


class UnknownApart(Nested):
    frozen_submodules = ("tokenizer.inner", "tokenizer.outer")


class FixedRows(Path):
    """len(x) is a number that Python knows."""

    def decode_image(self, codes: Tensor) -> Tensor:
        return super().decode_image(codes.reshape(len(codes), SIDE**2))


class FixedImages(Path):
    def sample_image(self, hidden: Tensor, noise: Tensor, guidance: Tensor, temperature: Tensor) -> Any:
        images = int(noise.shape[0])
        codes, x = super().sample_image(hidden, noise, guidance, temperature)
        return codes + torch.arange(images) * 0, x


class NoSampler(Path):
    image_sampler = "autoregresive"


class TextSampler(Path):
    image_sampler = "text"


class NoChoice(Path):
    def graphs(self) -> list[GraphSpec]:
        return super().graphs()[1:]


class NeverRun(Path):
    def graphs(self) -> list[GraphSpec]:
        return [*super().graphs(), replace(super().graphs()[1], name="upscale")]


class Encodes(Path):
    encoded = EncodedSpec((SIDE**2,), ids=(LEVELS,))

    def log_probabilities(
        self, hidden: Tensor, targets: Tensor, *, guidance: float, temperature: float
    ) -> Tensor:
        return self.head(hidden).log_softmax(-1).gather(-1, targets[..., None])[..., 0]


class WrongForm(Encodes):
    encoded = EncodedSpec((SIDE**2 + 1,), ids=(LEVELS,))


class Levels(Encodes):
    encoded = EncodedSpec((SIDE**2,), ids=(2,))


class FloatTargets(Encodes):
    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator] = ()) -> Any:
        return super().targets(pixels).float()

    def embed(self, targets: Any) -> Tensor:
        return self.embedding(targets.long())


class TotalScore(Encodes):
    def log_probabilities(self, *inputs: Any, **settings: float) -> Tensor:
        return super().log_probabilities(*inputs, **settings).sum(-1)


class Positive(Encodes):
    def log_probabilities(self, *inputs: Any, **settings: float) -> Tensor:
        return -super().log_probabilities(*inputs, **settings)


class OtherDtype(Path):
    def graphs(self) -> list[GraphSpec]:
        choose, decode, encode = super().graphs()
        return [choose, replace(decode, outputs=(replace(decode.outputs[0], dtype="float32"),)), encode]


class OtherShape(Path):
    def graphs(self) -> list[GraphSpec]:
        choose, *others = super().graphs()
        hidden, *inputs = choose.inputs
        return [replace(choose, inputs=(replace(hidden, shape=("3*images", WIDTH)), *inputs)), *others]


class OneImage(Path):
    """Declares rows where it takes images."""

    def graphs(self) -> list[GraphSpec]:
        choose, decode, encode = super().graphs()
        return [choose, decode, replace(encode, outputs=(replace(encode.outputs[0], shape=(1, SIDE**2)),))]


class NoSize(Path):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"levels": LEVELS}


class Crooked(Path):
    """Draws other images than it says."""

    def decode_image(self, codes: Tensor) -> Tensor:
        return super().decode_image(codes)[..., :-1]


class BranchesInPart(Path):
    def decode_image(self, codes: Tensor) -> Tensor:
        return super().decode_image(codes) if int(codes.sum()) > 0 else super().decode_image(codes * 0)


def outcome(path: type[Path], name: str) -> tuple[str, str]:
    """Run one check on a path."""
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    [check] = [check for check in checks_of("generation") if check.name == name]
    result = run_check(check, lambda: (path(), pixels), slot="generation")
    return result.outcome, result.note


PROMISES = (
    "generation_sizes",
    "generation_attributes",
    "generation_sampler",
    "generation_graphs",
    "gradients",
    "batch_invariance",
)
TRACED = ("meta_device", "exports")


@pytest.mark.parametrize("path", [NamedLikeOthers, DictTargets, Nested])
def test_a_sound_path_passes(path: type[Path]) -> None:
    found = {name: outcome(path, name) for name in PROMISES}
    if path is Nested:  # what is trained apart gets no gradient, and is not missed
        assert found["gradients"] == ("passed", "")
    assert set(found.values()) == {("passed", "")}


def test_a_path_that_declares_the_form_of_its_codes_passes() -> None:
    assert outcome(Encodes, "generation_encoded") == ("passed", "")
    found, note = outcome(Path, "generation_encoded")
    assert (found, "declares no form" in note) == ("skipped", True)


@pytest.mark.parametrize("name", [*TRACED, "onnx_parity", "drawing_graphs"])
def test_targets_may_be_named_tensors(name: str) -> None:
    assert outcome(DictTargets, name) == ("passed", "")


@pytest.mark.parametrize(
    ("path", "broken", "said"),
    [
        (UnknownApart, "generation_attributes", "frozen_submodules names ['tokenizer.outer']"),
        (WrongForm, "generation_encoded", "targets: found an array (4,) of int64; expected (5,)"),
        (Levels, "generation_encoded", "targets: found codes from"),
        (FloatTargets, "generation_encoded", "expected (4,) of int64"),
        (TotalScore, "generation_encoded", "log-probabilities are (2,); not (2, 4)"),
        (Positive, "generation_encoded", "log-probabilities go up to"),
        (FixedRows, "exports", "graph 'decode_image' fixes the number of rows"),
        (FixedRows, "drawing_graphs", "fixes the length of"),
        (FixedImages, "exports", "graph 'sample_image' fixes the number of rows"),
        (BranchesInPart, "exports", "decode_image"),
        (NoSampler, "generation_sampler", "Did you mean 'autoregressive'"),
        (TextSampler, "generation_sampler", "no image sampler is called 'text'"),
        (NoChoice, "generation_sampler", "runs the graph 'sample_image'; declared are decode_image"),
        (NeverRun, "generation_graphs", "its image sampler never runs 'upscale'"),
        (
            OtherDtype,
            "generation_graphs",
            "output 'pixels' of the graph 'decode_image' is declared as float",
        ),
        (
            OtherShape,
            "generation_graphs",
            "input 'hidden' of the graph 'sample_image' is declared as ['3*images'",
        ),
        (OneImage, "generation_graphs", "'tokenize_image' is declared as [1, 4], and is [3, 4] for 3 images"),
        (NoSize, "generation_sampler", "reads the size 'codes'"),
        (
            Crooked,
            "generation_sampler",
            "is declared as ['images', 3, 8, 8], and is [1, 3, 8, 7] for 1 images",
        ),
    ],
)
def test_a_broken_path_is_found(path: type[Path], broken: str, said: str) -> None:
    found, note = outcome(path, broken)
    assert found == "failed"
    assert said in note


@pytest.mark.parametrize("path", [NoSize, NoChoice])
def test_graphs_of_a_path_that_cannot_draw_are_not_compiled(path: type[Path]) -> None:
    outcome_of_graphs, note = outcome(path, "drawing_graphs")
    assert outcome_of_graphs == "skipped"
    assert "its image sampler fails" in note
