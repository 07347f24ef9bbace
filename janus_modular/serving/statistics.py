"""Counts and times of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine; counters are of its whole life."""

    running: int  # requests that have rows
    waiting: int  # requests that have none yet
    rows: int  # of the session
    answer_rows: int  # in use
    draw_rows: int  # in use
    steps: int  # of the backbone over the running rows
    prompt_positions: int  # that were read
    reused_positions: int  # of prompts, copied from rows that held them
    answered: int  # requests that ended with an answer
    drawn: int  # requests that ended with drawings
    failed: int  # requests that ended with an error, a deadline among these
    cancelled: int
    queue_seconds: float  # from submission to the first rows, summed over all requests that got any
    continued_codes: int  # of drawings, taken from the journal instead of drawn
    started: int  # requests that got rows: the mean time in the queue is queue_seconds / started
