"""The journal of drawings: a killed process loses no drawing, and an id stands for one image."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from janus_modular import PromptError
from janus_modular.errors import JournalError
from janus_modular.janus import Janus
from janus_modular.serving import AnswerRequest, DrawRequest, Engine, Progress
from janus_modular.serving.journal import DrawingRecord, Journal
from janus_modular.testing.serving import alone, ensure_same

REQUEST = DrawRequest("a cat", n=2, seed=5, request_id="first/..")


def killed_while_drawing(janus: Janus, folder: Path, codes: int) -> None:
    """Draw in a process of its own, which is killed once so many codes are drawn."""
    child = os.fork()
    if not child:
        gc.freeze()  # what earlier tests left would wait for its threads, which a fork does not copy
        engine = Engine(janus, rows=4, journal=folder)
        job = engine.resumed[0] if engine.resumed else engine.submit(REQUEST)
        for event in job:
            if isinstance(event, Progress) and event.done >= codes:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def lines(folder: Path) -> list[Any]:
    [file] = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_drawing_of_a_killed_process_goes_on(tiny: Janus, tmp_path: Path) -> None:
    for codes in (3, 24):
        killed_while_drawing(tiny, tmp_path, codes)
        assert len(lines(tmp_path)) - 1 >= codes
    with Engine(tiny, rows=4, journal=tmp_path) as engine:
        [job] = engine.resumed
        assert job.request_id == "first/.."
        again = engine.submit(REQUEST)  # a client that comes back
        ensure_same(REQUEST, again.result(60), alone(tiny, REQUEST))
        assert again is job or again.result() == job.result()
    assert lines(tmp_path)[-1] == "done"
    assert len(lines(tmp_path)) == 2 + 32  # each code once
    with Engine(tiny, rows=4, journal=tmp_path) as engine:
        assert not engine.resumed
        ensure_same(REQUEST, engine.submit(REQUEST).result(60), alone(tiny, REQUEST))
        with pytest.raises(PromptError, match="which another request has"):
            engine.submit(DrawRequest("a dog", request_id="first/.."))
    assert len(lines(tmp_path)) == 2 + 32


def test_what_closing_cancels_is_kept_and_what_a_client_cancels_is_not(tiny: Janus, tmp_path: Path) -> None:
    engine = Engine(tiny, rows=2, journal=tmp_path)
    cancelled = engine.submit(DrawRequest("cancelled", n=9))
    kept = engine.submit(DrawRequest("kept", n=9, request_id="kept"))
    next(iter(cancelled))
    cancelled.cancel()
    next(iter(kept))
    engine.close(drain=False)
    with Engine(tiny, rows=2, journal=tmp_path) as engine:
        assert [job.request_id for job in engine.resumed] == ["kept"]
        ensure_same(kept.request, engine.resumed[0].result(60), alone(tiny, kept.request))  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_that_request(
    tiny: Janus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal's file is a link to the device whose writes fail as those of a full disk."""
    begin = Journal.begin

    def full(self: Journal, request_id: str, request: DrawRequest) -> DrawingRecord:
        record = begin(self, request_id, request)
        if request_id == "full":
            record.file.unlink()
            record.file.symlink_to("/dev/full")
        return record

    monkeypatch.setattr(Journal, "begin", full)
    with Engine(tiny, rows=4, journal=tmp_path) as engine:
        other = engine.submit(DrawRequest("a cat"))
        answer = engine.submit(AnswerRequest("hello", max_new_tokens=4))
        with pytest.raises(JournalError, match="cannot be written: No space left"):
            engine.submit(DrawRequest("a dog", request_id="full")).result(60)
        assert other.result(60)
        assert answer.result(60) is not None
        assert engine.stats().draw_rows == 0


def test_another_model_is_noticed(tiny: Janus, tmp_path: Path) -> None:
    with Engine(tiny, journal=tmp_path) as engine:
        engine.submit(REQUEST).result(60)
    [file] = tmp_path.glob("*.jsonl")
    first, *codes, _ = file.read_text().splitlines()
    image, code = json.loads(codes[3])
    codes[3] = json.dumps([image, (code + 1) % 64])
    file.write_text("\n".join([first, *codes]) + "\n")
    with Engine(tiny, journal=tmp_path) as engine, pytest.raises(JournalError, match="this model draws"):
        engine.resumed[0].result(60)


@pytest.mark.parametrize("content", ["[]\n", "{}\n", '{"id": "a"}\n[1\n', "\x00\n"])
def test_a_damaged_file_is_named(tiny: Janus, tmp_path: Path, content: str) -> None:
    (tmp_path / "damaged.jsonl").write_text(content)
    with pytest.raises(JournalError, match=r"damaged\.jsonl is damaged"):
        Engine(tiny, journal=tmp_path)
    (tmp_path / "damaged.jsonl").unlink()
    Engine(tiny, journal=tmp_path).close()


def test_a_drawing_that_this_model_refuses_names_its_file_and_frees_the_folder(
    tiny: Janus, tmp_path: Path
) -> None:
    with Engine(tiny, journal=tmp_path) as engine:
        engine.submit(DrawRequest("a", request_id="b")).result(60)
    [file] = tmp_path.glob("*.jsonl")
    first, *_ = lines(tmp_path)
    first["request"]["settings"] = {"steps": 30}  # of another image sampler
    file.write_text(json.dumps(first) + "\n", "utf-8")
    with pytest.raises(JournalError, match=f"{file.name} holds a drawing that this model refuses: steps: no"):
        Engine(tiny, journal=tmp_path)
    file.unlink()
    Engine(tiny, journal=tmp_path).close()


def test_what_a_kill_cut_off_is_no_damage(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    record = journal.begin("a", DrawRequest("a", settings={"prefix": np.array([3, 4])}))
    record.add(0, 0, np.int64(3))
    with record.file.open("ab") as file:
        file.write(b"[0, 1")
    (tmp_path / "begun.jsonl").write_bytes(b'{"id": "b", "requ')
    [again] = journal.open_records()
    assert again.codes == {0: [3]}
    assert again.request.settings == {"prefix": [3, 4]}
    assert not (tmp_path / "begun.jsonl").exists()
    again.add(0, 1, 7)
    assert journal.read(again.file).codes == {0: [3, 7]}
    journal.close()


def test_a_journal_has_one_engine(tiny: Janus, tmp_path: Path) -> None:
    with Engine(tiny, journal=tmp_path), pytest.raises(JournalError, match="another process is writing"):
        Engine(tiny, journal=tmp_path)
