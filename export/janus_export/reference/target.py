"""The variant that is verified, and its reference: recorded runs of the model in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from janus_export.bundle.bundle import Bundle
from janus_export.errors import BundleError
from janus_export.reference.prompts import ANSWER_TOKENS, questions, record_answers, record_drawings
from janus_export.reference.recording import Run
from janus_export.reference.upcast import upcast_bundle
from janus_export.runtimes.contract import GivesEvidence, RunsGraphs
from janus_export.runtimes.ort.runtime import OnnxConfig, OnnxRuntime
from janus_modular import ImageInput, Message
from janus_modular.bundles import open_bundle
from janus_modular.janus import Janus
from janus_modular.protocols import Runtime


@dataclass(frozen=True)
class CheckResult:
    """The result of one comparison of a gate."""

    name: str  # what was compared
    passed: bool
    measured: str
    expected: str


class Reference:
    """The model in torch and float32, and its recorded runs; each run is made once for all variants."""

    is_streamed = False  # its weights are in memory, so that it can be run as a whole

    def __init__(self, janus: Janus, prompts: list[list[Message]] | None = None) -> None:
        self.janus, self.model, self.processor = janus, janus.model, janus.processor
        self.prompts = questions() if prompts is None else prompts
        self.graphs = {graph.name: graph for graph in self.model.generation.graphs()}
        self.fewer: dict[int, Reference] = {}

    @classmethod
    def of(cls, path: str | Path) -> Reference:
        """Load the reference from a checkpoint."""
        return cls(Janus.from_pretrained(path, device="cpu", dtype="float32"))

    def within(self, max_positions: int, *, images: bool = True) -> Reference:
        """Return the reference with only those questions whose answers fit into ``max_positions`` positions.

        The capacity of engines may be less than two images need; and a bundle without image understanding
        gets no questions about images (``images``).
        """
        lengths = [len(self.processor.chat_prompt(question)) + ANSWER_TOKENS for question in self.prompts]
        fitting = [
            question
            for question, length in zip(self.prompts, lengths, strict=True)
            if length <= max_positions and (images or not any(map(_has_image, question)))
        ]
        if len(fitting) == len(self.prompts):
            return self
        if not fitting:
            raise BundleError(
                f"a capacity of {max_positions} positions is too small for the shortest question"
            )
        return self.fewer.setdefault(len(fitting), Reference(self.janus, fitting))

    @cached_property
    def greedy(self) -> tuple[list[str], Run]:
        """Greedy answers."""
        return record_answers(self.janus.runtime, self.processor, self.prompts)

    @cached_property
    def sampled(self) -> tuple[list[str], Run]:
        """Sampled answers, with top-k and top-p."""
        settings = {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 3}
        return record_answers(self.janus.runtime, self.processor, self.prompts, **settings)

    @cached_property
    def drawn(self) -> tuple[list[Image.Image], Run]:
        """Drawings under guidance."""
        return record_drawings(self.janus.runtime, self.processor)

    @cached_property
    def unguided(self) -> Run:
        """Drawings without guidance, which would enlarge errors of the states."""
        return record_drawings(self.janus.runtime, self.processor, count=2, guidance=1.0)[1]

    @property
    def sampling_graphs(self) -> list[str]:
        """The graphs that choose ids."""
        return ["sample_text", *(name for name, graph in self.graphs.items() if graph.role == "sample")]


def _has_image(message: Message) -> bool:
    return any(isinstance(segment, ImageInput) for segment in message.content)


@dataclass
class VerificationTarget:
    """One variant of a bundle, ready to run."""

    bundle: Bundle
    variant: str
    reference: Reference
    runtime: OnnxRuntime  # runs the graphs; half precision on a CPU: float32 with rounded weights
    whole: Runtime  # the users' runtime, for prompts, steps, whole answers and drawings
    how: str

    @classmethod
    @contextmanager
    def of(
        cls, bundle: Bundle, variant: str, reference: Reference, *, runtime: str, device: str
    ) -> Iterator[VerificationTarget]:
        """Open a variant; ONNX Runtime cannot run half precision on a CPU, so there its graphs are upcast."""
        with TemporaryDirectory() as temporary:
            on = device if runtime == "onnx" and not reference.is_streamed else "cpu"
            opened = OnnxRuntime(OnnxConfig(variant, on), bundle)
            how = f"ONNX Runtime on {opened.device.name}"
            if opened.device.memory == "cpu" and bundle.manifest["variants"][variant]["dtype"] != "float32":
                if not reference.is_streamed:
                    opened = OnnxRuntime(
                        OnnxConfig(variant, "cpu"), upcast_bundle(bundle, variant, Path(temporary))
                    )
                how += ", in float32 with the variant's rounded weights"
            whole: Runtime = opened
            if runtime != "onnx":
                whole, *_ = open_bundle(
                    bundle.folder, runtime=runtime, variant=variant, device=device, allow_failed=True
                )
                how = f"{runtime} on {whole.evidence['gpu'] if isinstance(whole, GivesEvidence) else device}"
            yield cls(
                bundle,
                variant,
                reference.within(whole.context, images="understand" in bundle.graphs),
                opened,
                whole,
                how,
            )

    @property
    def record(self) -> dict[str, Any]:
        """The variant's entry in the manifest."""
        return self.bundle.manifest["variants"][self.variant]

    @property
    def graph_runtime(self) -> Any:
        """The runtime of single graphs: the users' runtime if it runs graphs by name."""
        return self.whole if isinstance(self.whole, RunsGraphs) else self.runtime

    @property
    def is_half(self) -> bool:
        """True if the variant is in half precision."""
        return self.record["dtype"] != "float32"

    @property
    def is_exact(self) -> bool:
        """True if results must equal the model's, except for the order of float32 sums."""
        return not self.is_half and not self.record["quantization"]

    @property
    def backbone_precision(self) -> str | int:
        """The precision of the backbone's weights: 4 or 8 bits, "half", or "exact"."""
        return self.precision_of("backbone")

    def precision_of(self, graph: str) -> str | int:
        """Return the precision of a graph's weights, in the terms of `backbone_precision`."""
        quantization = self.record["quantization"]
        if quantization and graph in quantization["graphs"]:
            return quantization.get("graph_bits", {}).get(graph, quantization["bits"])
        return "half" if self.is_half or self.record.get("storage", "float32") != "float32" else "exact"

    def embeddings_of(self, graph: str) -> str | int:
        """Return the precision of the embeddings that a graph returns with its ids."""
        return self.precision_of("embed" if graph == "sample_text" else graph)

    def has(self, mode: str) -> bool:
        """Return True if the bundle has the graphs of a mode."""
        return mode in self.bundle.modes
