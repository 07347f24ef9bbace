"""How many processes take part in a training: one, until training on several exists."""

from __future__ import annotations

import os

from janus_modular.errors import TrainingError

COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""In which variables launchers (torchrun, accelerate, mpirun, srun) say how many processes they started."""


def refuse_several_processes() -> None:
    """Refuse to train as one of several processes: each would train the same model on the same samples.

    Raises:
        TrainingError: a launcher has started more than one process.
    """
    for name in COUNTS:
        if (count := os.environ.get(name, "")).strip() not in ("", "1"):
            raise TrainingError(
                f"{name}={count}: a launcher started several processes, and training on several is not"
                " supported yet: each would train the same model on the same samples. Start one process,"
                f" without torchrun or the like; where {name} is left over from something else, unset it."
            )
