"""Runs the graphs that tasks ask for: calls of the same graph at once, where its tensors allow it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.protocols import SharedSession
from janus_modular.serving.joining import Joinable, JoinableGraph, run_joined
from janus_modular.serving.row_view import RunCall, SharedTensor, Vectors, own_tensor
from janus_modular.serving.tasks import Task

ALONE = ("decode", "encode")
"""Roles of graphs that run once for each request, so that pixels do not depend on other requests: kernels sum
in another order for other shapes, and pixels are truncated to whole numbers."""

MOST_DIFFERENCES = 3
"""A graph whose joined calls differ as often from its calls alone is not joined anymore."""

TOLERANCE = 1e-2
"""Of the largest number; what half precision allows. Vectors of other rows differ by about 1."""

Outcome = tuple[Task, Any, Exception | None]
"""A task, and the result of its call or the error that it raised."""

log = logging.getLogger(__name__)


class GraphRunner:
    """Runs graphs of a session for several tasks."""

    def __init__(self, session: SharedSession) -> None:
        self.session = session
        self.graphs: dict[str, JoinableGraph | None] = {}  # None: its calls cannot be joined
        self.differences: dict[tuple[Any, ...], int] = {}  # by graph; -1: joined calls were compared
        self.inputs: list[SharedTensor] = []  # next inputs of rows, which another graph may overwrite

    def run(self, calls: Mapping[Task, RunCall]) -> Iterator[Outcome]:
        """Run the calls of tasks; yield the outcome of each."""
        groups: dict[Any, list[tuple[Task, Joinable]]] = {}
        for task, call in calls.items():
            if (candidate := self._joinable(call)) is None:
                yield self._outcome(task, lambda call=call: self._run_alone(call))
            else:
                groups.setdefault(candidate.key, []).append((task, candidate))
        for group in groups.values():
            yield from self._run_group(group)

    def forget_inputs(self) -> None:
        """Note that the backbone has read the inputs that graphs returned."""
        self.inputs.clear()

    def _run_group(self, group: Sequence[tuple[Task, Joinable]]) -> Iterator[Outcome]:
        joined, graph = list[Any](), group[0][1].key[:2]
        if len(group) > 1 and self.differences.get(graph, 0) < MOST_DIFFERENCES:
            try:
                joined = self._run([call for _, call in group])
            except Exception:
                joined = []  # alone, only the call raises whose error it is
            if joined and self.differences.get(graph, 0) >= 0:
                joined = self._compare(graph, group, joined)
        for index, (task, call) in enumerate(group):
            if joined:
                yield task, joined[index], None
            else:
                yield self._outcome(task, lambda call=call: self._run([call])[0])

    def _outcome(self, task: Task, run: Any) -> Outcome:
        try:
            return task, run(), None
        except Exception as error:
            return task, None, error

    def _run(self, calls: Sequence[Joinable]) -> list[Any]:
        self.copy_inputs()
        results = run_joined(self.session, calls)
        outputs = results[0] if isinstance(results[0], tuple) else results[:1]
        self.inputs += [output.source for output in outputs if isinstance(output, Vectors)]
        return results

    def _run_alone(self, call: RunCall) -> Any:
        """Run a graph whose calls cannot be joined; next inputs of rows are copied."""
        self.copy_inputs()
        inputs = [own_tensor(self.session, x) for x in call.inputs]
        outputs = self.session.run(call.name, *inputs)
        if isinstance(outputs, tuple):
            return tuple(self._copied(output) for output in outputs)
        return self._copied(outputs)

    def _copied(self, output: Any) -> Any:
        shape = tuple(output.shape)
        if isinstance(output, np.ndarray) or len(shape) < 2 or shape[-1] != self.session.hidden_size:
            return output
        return self.session.take(output, np.arange(prod(shape[:-1])).reshape(shape[:-1]))

    def copy_inputs(self) -> None:
        """Copy next inputs of rows that the backbone has not read yet, before other calls overwrite them."""
        for source in self.inputs:
            source.tensor = self.session.take(source.tensor, np.arange(source.tensor.shape[0]))
        self.inputs.clear()

    def _joinable(self, call: RunCall) -> Joinable | None:
        if call.name not in self.graphs:
            signature = self.session.signatures.get(call.name)
            graph = None if signature is None else JoinableGraph(call.name, signature)
            may_join = graph is not None and graph.is_joinable and graph.signature.role not in ALONE
            self.graphs[call.name] = graph if may_join else None
        graph = self.graphs[call.name]
        return None if graph is None else graph.joinable(call)

    def _compare(
        self, graph: tuple[Any, ...], group: Sequence[tuple[Task, Joinable]], joined: list[Any]
    ) -> list[Any]:
        """Compare joined calls with calls alone, the first time; return [] if they differ.

        A graph of a third party may order the rows of images otherwise.
        """
        for (_, call), result in zip(group, joined, strict=True):
            [alone] = self._run([call])
            pairs = zip(result, alone, strict=True) if isinstance(result, tuple) else [(result, alone)]
            if not all(self._same(first, second) for first, second in pairs):
                self.differences[graph] = self.differences.get(graph, 0) + 1
                if self.differences[graph] == MOST_DIFFERENCES:
                    log.warning(
                        "the graph '%s' gives other results for images of several requests than for each"
                        " alone, so it runs once for each request. Images' rows are expected in blocks:"
                        " first one row of every image, then the next.",
                        graph[0],
                    )
                return []
        self.differences[graph] = -1
        return joined

    def _same(self, first: Any, second: Any) -> bool:
        low, high = (self._numbers(first), self._numbers(second))
        if low.dtype.kind in "ib":
            return np.array_equal(low, high)
        difference = np.abs(low.astype(np.float64) - high).max(initial=0)
        return bool(difference <= TOLERANCE * np.abs(low).max(initial=0))

    def _numbers(self, x: Any) -> NDArray[Any]:
        return self.session.to_host(own_tensor(self.session, x)) if isinstance(x, Vectors) else np.asarray(x)
