"""The results that the papers of Janus and Janus-Pro report, to be shown beside a model's own."""

from __future__ import annotations

from dataclasses import dataclass

JANUS = "Janus, arXiv:2410.13848"
JANUS_PRO = "Janus-Pro, arXiv:2501.17811"


@dataclass(frozen=True)
class PublishedResult:
    """A result of a paper, in the paper's unit."""

    model: str
    value: float
    unit: str
    source: str


UNITS = {
    "pope": "POPE, %",
    "mmbench": "MMBench, %",
    "geneval": "GenEval, overall, 0 to 1",
    "dpg-bench": "DPG-Bench, 0 to 100",
}
"""What the papers call their numbers, by the format of an evaluation."""

VALUES = {
    "Janus 1.3B": ({"pope": 87.0, "mmbench": 69.4, "geneval": 0.61, "dpg-bench": 79.68}, JANUS),
    "Janus-Pro-1B": ({"pope": 86.2, "mmbench": 75.5, "geneval": 0.73, "dpg-bench": 82.63}, JANUS_PRO),
    "Janus-Pro-7B": ({"pope": 87.4, "mmbench": 79.2, "geneval": 0.80, "dpg-bench": 84.19}, JANUS_PRO),
}


def published_results(evaluate: str) -> list[PublishedResult]:
    """Return the papers' results for the format of an evaluation; none where they report none."""
    return [
        PublishedResult(model, values[evaluate], UNITS[evaluate], source)
        for model, (values, source) in VALUES.items()
        if evaluate in values
    ]
