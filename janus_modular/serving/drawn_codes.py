"""The codes of an image while it is drawn, as graphs return them: for partial images and for journals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.graph_specs import GraphSignature
from janus_modular.serving.row_view import RowView


@dataclass(frozen=True)
class CodeGraphs:
    """The graphs of a generation path that draws code by code."""

    sample: str  # samples the next codes of images (N,) or (N, S)
    output: int  # which of its outputs these are
    decode: str  # decodes codes (N, P) or (N, P, S) into images
    positions: int  # P
    can_embed: bool  # the path embeds codes that were drawn before

    @classmethod
    def of(cls, signatures: Mapping[str, GraphSignature]) -> CodeGraphs | None:
        """Return the graphs among those of a session; None if its path has no codes, or more such graphs."""
        by_role = {
            role: [(name, graph) for name, graph in signatures.items() if graph.role == role]
            for role in ("sample", "decode")
        }
        if [len(graphs) for graphs in by_role.values()] != [1, 1]:
            return None
        [(sample, sampling)], [(decode, decoding)] = by_role["sample"], by_role["decode"]
        [codes, *further] = decoding.inputs
        if further or codes.dtype != "int64" or len(codes.shape) < 2 or not isinstance(codes.shape[1], int):
            return None
        of_step = (codes.shape[0], *codes.shape[2:])
        outputs = [
            index
            for index, tensor in enumerate(sampling.outputs)
            if (tensor.dtype, tensor.shape) == ("int64", of_step)
        ]
        if len(outputs) != 1:
            return None
        can_embed = any(graph.role == "embed" for graph in signatures.values())
        return cls(sample, outputs[0], decode, codes.shape[1], can_embed)


class DrawnCodes:
    """Collects the codes of the one image that a view draws.

    A call of the sampling graph for one position gives a final code. A call for several positions gives the
    codes of the next positions, of which those are final that the sampler's progress counts afterwards.
    """

    def __init__(
        self,
        view: RowView,
        graphs: CodeGraphs,
        prefix: Sequence[Any],
        on_code: Callable[[Any], None] | None = None,
    ) -> None:
        """Note what the path's sampling graph returns from now on, after the codes of a prefix.

        ``on_code`` gets each further code that is final, or the S codes of a position.
        """
        self.view, self.graphs, self.on_code = view, graphs, on_code
        # Codes (n,) or (n, S), and how many of the n are final.
        self.parts: list[tuple[Any, int]] = [(np.array([codes]), 1) for codes in prefix]
        self.count = len(prefix)  # final codes
        self.open: Any = None  # codes of a call for several positions, of which none is final yet
        view.on_run = self._on_run

    @property
    def codes(self) -> NDArray[np.int64]:
        """The codes so far, (k,) or (k, S)."""
        return np.concatenate([self.view.to_host(codes)[:count] for codes, count in self.parts])

    @property
    def is_complete(self) -> bool:
        """True if all codes are there."""
        return self.count == self.graphs.positions

    def decode(self) -> NDArray[Any]:
        """Return the image (3, H, W) as it would be if its last code were repeated to the end."""
        codes = self.codes
        missing = np.repeat(codes[-1:], self.graphs.positions - len(codes), axis=0)
        whole = np.concatenate([codes, missing])[None]
        image: NDArray[Any] = self.view.to_host(self.view.run(self.graphs.decode, whole))[0]
        return image

    def advance(self, done: int) -> None:
        """Note that ``done`` codes of the image are final, by the sampler's progress."""
        new = done - self.count
        if self.open is not None and 0 < new <= self.open.shape[0]:
            self._add(self.open, new)

    def _on_run(self, name: str, outputs: Any) -> None:
        if name != self.graphs.sample:
            return
        codes = outputs[self.graphs.output] if isinstance(outputs, tuple) else outputs
        if codes.shape[0] == 1:
            self._add(codes, 1)
        else:
            self.open = codes

    def _add(self, codes: Any, count: int) -> None:
        self.parts.append((codes, count))
        self.count, self.open = self.count + count, None
        if self.on_code is not None:
            for code in self.view.to_host(codes)[:count]:
                self.on_code(code)


def partial_steps(count: int, positions: int) -> dict[int, int]:
    """Return the numbers of an image's partial images, by the steps after which they are decoded.

    They are evenly spaced, and the first comes early: after a quarter of the steps if it is the only one.
    """
    parts = max(count + 2, 4)
    return {max(1, positions * (number + 1) // parts): number for number in range(count)}
