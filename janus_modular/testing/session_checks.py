"""Checks of sessions: each row is admitted, extended, truncated and freed on its own."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from janus_modular.errors import PromptError
from janus_modular.protocols import Runtime, Session
from janus_modular.sequence import Sequence
from janus_modular.testing.check import check_for, ensure
from janus_modular.testing.examples import prompt

POSITIONS = 16
"""Positions that rows are fed after their prompts."""

TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2
"""Of the largest number. Kernels add in another order for other shapes, which changes float32 by 1e-6 of it,
and half precision, which keeps 3 digits, by 1e-3."""


@check_for("runtimes")
def check_session_admit(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """Prompts are admitted into free rows, in any order, while the other rows stay as they are."""
    x = embeddings(runtime, prompts, 3)
    session = runtime.open(max_seq_len_for(prompts), rows=3)
    _compare(session, session.admit(prompts[:1], [1]), [_alone(runtime, prompts[0])[0]], "admitted to row 1")
    session.extend(x[:, :4], [0, 4, 0])
    states = session.admit([prompts[1], prompts[0]], [2, 0])
    _compare(session, states, [_alone(runtime, prompts[i])[0] for i in (1, 0)], "admitted later")
    expected = [len(prompts[0]), len(prompts[0]) + 4, len(prompts[1])]
    ensure(session.lengths.tolist() == expected, f"lengths are {session.lengths}; expected {expected}")
    rest = session.to_host(session.extend(x[:, 4:10]))
    for row, sequence, start in ((0, prompts[0], 4), (1, prompts[0], 0), (2, prompts[1], 4)):
        states_alone = _alone(runtime, sequence, x[row, start:10])[1][4 - start :]
        _same(rest[row], states_alone, f"row {row} beside rows that came earlier or later")


@check_for("runtimes")
def check_session_extend(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """Positions that are fed 1, 2, 7 or 16 at once give what they give in one pass."""
    x = embeddings(runtime, prompts, 2)
    expected = [_alone(runtime, prompts[row], x[row])[1] for row in range(2)]
    for count in (1, 2, 7, POSITIONS):
        session = runtime.open(max_seq_len_for(prompts))
        session.prefill(prompts[:2])
        states = [
            session.to_host(session.extend(x[:, start : start + count]))
            for start in range(0, POSITIONS, count)
        ]
        for row, row_states in enumerate(expected):
            _same(np.concatenate([state[row] for state in states]), row_states, f"{count} positions at once")
    session = runtime.open(max_seq_len_for(prompts))
    session.prefill(prompts[:2])
    for position in range(3):
        stepped = session.to_host(session.step(x[:, position]))
        _same(stepped, np.stack([row_states[position] for row_states in expected]), f"step {position + 1}")


@check_for("runtimes")
def check_session_counts(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """A row keeps as many positions as its count says, and continues from there."""
    x = embeddings(runtime, prompts, 2)
    expected = [_alone(runtime, prompts[row], x[row])[1] for row in range(2)]
    session = runtime.open(max_seq_len_for(prompts))
    session.prefill(prompts[:2])
    done = np.zeros(2, np.int64)
    for counts in ((3, 0), (1, 7), (0, 2), (7, 5)):
        fed = np.zeros((2, 7, x.shape[2]), np.float32)
        for row, count in enumerate(counts):
            fed[row, :count] = x[row, done[row] : done[row] + count]
        states = session.to_host(session.extend(fed, np.array(counts)))
        for row, count in enumerate(counts):
            row_states = expected[row][done[row] : done[row] + count]
            _same(states[row, :count], row_states, f"row {row} with counts {counts}")
        done += counts
    lengths = (done + [len(sequence) for sequence in prompts[:2]]).tolist()
    ensure(session.lengths.tolist() == lengths, f"lengths are {session.lengths}; expected {lengths}")


@check_for("runtimes")
def check_session_full_rows(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """A full row stays as it is while others are fed."""
    x = embeddings(runtime, prompts, 2)
    longest = int(np.argmax([len(sequence) for sequence in prompts[:2]]))
    longer, shorter = prompts[longest], prompts[1 - longest]
    session = runtime.open(len(longer) + 4, rows=2)
    session.admit([longer, shorter], [0, 1])
    session.extend(x[:, :4], [4, 0])
    states = [session.to_host(session.extend(x[:, :3], [0, 3]))[1]]
    states.append(session.to_host(session.step(x[:, 3], np.array([False, True])))[1:])
    _same(np.concatenate(states), _alone(runtime, shorter, x[1, :4])[1], "a row beside a full one")
    if session.has_states:
        return
    session.truncate([len(longer) + 3, 0])
    again = session.to_host(session.extend(x[:, 3:4], [1, 0]))[0]
    _same(again, _alone(runtime, longer, x[0, :4])[1][3:], "the full row, cut back by one")


@check_for("runtimes")
def check_session_truncate(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """A row that is cut back continues as if it had never been longer; one with states is not cut."""
    x, fresh = embeddings(runtime, prompts, 2), embeddings(runtime, prompts, 2, seed=1)
    session = runtime.open(max_seq_len_for(prompts))
    session.prefill(prompts[:2])
    shorter = session.lengths + np.array([5, 0])
    session.extend(x[:, :9])
    if session.has_states:
        _refuses_to_cut(runtime, session, prompts, x)
        return
    session.truncate(shorter)
    ensure(session.lengths.tolist() == shorter.tolist(), f"lengths are {session.lengths}; expected {shorter}")
    states = session.to_host(session.extend(fresh[:, :6]))
    for row, kept in enumerate((5, 0)):
        inputs = np.concatenate([x[row, :kept], fresh[row, :6]])
        _same(
            states[row],
            _alone(runtime, prompts[row], inputs)[1][kept:],
            f"row {row} cut back to {kept} of 9 positions",
        )


def _refuses_to_cut(
    runtime: Runtime, session: Session, prompts: Many[Sequence], x: NDArray[np.float32]
) -> None:
    """Check that a session whose rows have states says so before it cuts any, and goes on."""
    before = session.lengths.tolist()
    try:
        session.truncate([before[0], before[1] - 1])
    except PromptError:
        ensure(session.lengths.tolist() == before, f"lengths are {session.lengths}; expected {before}")
    else:
        ensure(False, "truncate cuts a row whose states are not known there; expected a PromptError")
    session.truncate([before[0], 0])
    states = session.to_host(session.extend(x[:, 9:12], [3, 0]))
    _same(states[0], _alone(runtime, prompts[0], x[0, :12])[1][9:], "the row beside one that was emptied")


@check_for("runtimes")
def check_session_free(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """A row that was freed takes another prompt, and nothing of the first is left."""
    x = embeddings(runtime, prompts, 2)
    session = runtime.open(max_seq_len_for(prompts))
    session.prefill(prompts[:2])
    session.extend(x[:, :6])
    session.free([0])
    ensure(session.lengths[0] == 0, f"the freed row has {session.lengths[0]} positions")
    _compare(session, session.admit([prompts[1]], [0]), [_alone(runtime, prompts[1])[0]], "a row used again")
    states = session.to_host(session.extend(x[:, 6:10]))
    _same(states[0], _alone(runtime, prompts[1], x[0, 6:10])[1], "the row that was used again")
    _same(states[1], _alone(runtime, prompts[1], x[1, :10])[1][6:], "the row beside it")


@check_for("runtimes")
def check_session_limits(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """What does not fit is a PromptError, and changes nothing."""
    x = embeddings(runtime, prompts, 3)
    limit = max(map(len, prompts[:2])) + 4
    session = runtime.open(limit, rows=3)
    session.admit(prompts[:2], [0, 1])
    before, hidden_size = session.lengths.tolist(), x.shape[2]
    long = prompt(*np.resize(prompts[0].tokens, limit + 1).tolist())
    requests: dict[str, Callable[[], Any]] = {
        "admits into a row that is not free": lambda: session.admit(prompts[:1], [1]),
        "admits into a row that there is not": lambda: session.admit(prompts[:1], [3]),
        "admits two prompts into one row": lambda: session.admit(prompts[:2], [2, 2]),
        "admits fewer prompts than rows": lambda: session.admit([], [2]),
        "admits a prompt that is too long": lambda: session.admit([long], [2]),
        "extends a free row": lambda: session.extend(x[:, :1], [0, 0, 1]),
        "extends a row beyond max_seq_len": lambda: session.extend(x, [POSITIONS, 0, 0]),
        "extends by more than x holds": lambda: session.extend(x[:, :2], [3, 0, 0]),
        "extends by less than nothing": lambda: session.extend(x[:, :2], [-1, 0, 0]),
        "extends by x of two axes": lambda: session.extend(x[:, 0], [1, 0, 0]),
        "extends by x of another hidden size": lambda: session.extend(x[:, :1, : hidden_size - 1], [1, 0, 0]),
        "steps a free row": lambda: session.step(x[:, 0]),
        "truncates to more than there is": lambda: session.truncate([before[0] + 1, 0, 0]),
        "truncates to less than nothing": lambda: session.truncate([-1, 0, 0]),
        "truncates two rows of three": lambda: session.truncate([0, 0]),
        "frees a row that there is not": lambda: session.free([3]),
        "frees a row by text": lambda: session.free(cast(Any, "0")),
        "frees a fraction of a row": lambda: session.free([cast(Any, 0.9)]),
        "frees a number instead of a list": lambda: session.free(cast(Any, 0)),
        "admits into a fraction of a row": lambda: session.admit(prompts[:1], [cast(Any, 2.7)]),
        "admits into no rows": lambda: session.admit(prompts[:1], cast(Any, None)),
        "admits a token below the vocabulary": lambda: session.admit([prompt(-1)], [2]),
        "admits a token beyond the vocabulary": lambda: session.admit([prompt(session.vocab_size)], [2]),
        "prefills more prompts than rows": lambda: session.prefill([*prompts[:2], *prompts[:2]]),
        "opens a session beyond the context": lambda: runtime.open(runtime.context + 1),
        "opens a session of a fraction of a position": lambda: runtime.open(cast(Any, 8.5)),
        "opens a session of True rows": lambda: runtime.open(limit, rows=True),
    }
    for label, request in requests.items():
        try:
            request()
        except PromptError:
            ensure(
                session.lengths.tolist() == before,
                f"a call that {label} raises an error, and changes lengths",
            )
        else:
            ensure(False, f"a call that {label} raises no error; expected a PromptError")
    states = session.to_host(session.extend(x[:, :4], [4, 4, 0]))
    for row in range(2):
        _same(states[row], _alone(runtime, prompts[row], x[row, :4])[1], "a row after requests that failed")


@check_for("runtimes")
def check_session_copies(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """Copies made by take or to_host do not change in later calls, and can be fed."""
    x = embeddings(runtime, prompts, 2)
    session = runtime.open(max_seq_len_for(prompts))
    last = session.prefill(prompts[:2])
    first = session.take(last, np.array([1, 0]))
    on_host = [session.to_host(last)[::-1]]
    hidden = session.extend(x[:, :3])
    chosen = session.take([hidden, x[:, :1]], np.array([[1, 5], [6, 7]]))
    states = session.to_host(hidden)
    on_host.append(np.array([[states[0, 1], states[1, 2]], [x[0, 0], x[1, 0]]]))
    kept = states.copy()
    session.extend(x[:, 3:6])
    session.step(x[:, 6])
    for copied, values in zip((first, chosen), on_host, strict=True):
        shape = session.to_host(copied).shape
        ensure(shape == values.shape, f"take returned the shape {shape}; expected {values.shape}")
        _same(session.to_host(copied), values, "a copy by take")
    ensure(bool((states == kept).all()), "what to_host returned changes when the session goes on")
    again = runtime.open(max_seq_len_for(prompts))
    again.prefill(prompts[:2])
    fed = session.to_host(chosen)
    got = again.to_host(again.extend(again.take([fed], np.arange(4).reshape(2, 2))))
    for row in range(2):
        _same(got[row], _alone(runtime, prompts[row], fed[row])[1], "feeding what take returned")


def max_seq_len_for(prompts: Many[Sequence]) -> int:
    """Return a length that holds each prompt and what the checks feed after it."""
    return max(map(len, prompts)) + POSITIONS


def embeddings(runtime: Runtime, prompts: Many[Sequence], rows: int, seed: int = 0) -> NDArray[np.float32]:
    """Return random inputs (rows, `POSITIONS`, D) of a runtime's sessions."""
    session = runtime.open(max_seq_len_for(prompts))
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, POSITIONS, session.hidden_size), np.float32)


def _alone(
    runtime: Runtime, sequence: Sequence, x: NDArray[np.float32] | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the last state (D,) of a prompt, and those of x (T, D) after it, in a session of one row."""
    session = runtime.open(len(sequence) + POSITIONS, rows=1)
    last = session.to_host(session.admit([sequence], [0]))[0]
    return last, last[:0] if x is None else session.to_host(session.extend(x[None]))[0]


def _compare(session: Session, states: Any, expected: Many[NDArray[Any]], label: str) -> None:
    _same(session.to_host(states), np.stack(expected), f"the last states of prompts {label}")


def _same(actual: NDArray[Any], expected: NDArray[Any], label: str) -> None:
    ensure(actual.shape == expected.shape, f"{label}: the shape {actual.shape}; expected {expected.shape}")
    if not expected.size:
        return
    difference, scale = float(np.abs(actual - expected).max()), float(np.abs(expected).max())
    ensure(
        difference <= (HALF_TOLERANCE if _is_half(expected) else TOLERANCE) * scale,
        f"{label}: states differ by {difference:.2e}, at values up to {scale:.2e}, from those of a row alone",
    )


def _is_half(states: NDArray[Any]) -> bool:
    """Return True if all states are numbers of float16 or bfloat16, whatever dtype they were returned in."""
    single = states.astype(np.float32)
    is_bfloat16 = not (single.view(np.uint32) & 0xFFFF).any()
    return is_bfloat16 or bool((single.astype(np.float16).astype(np.float32) == single).all())
