"""The journal of drawings: a killed process loses no drawing, and an id stands for one image."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_modular import PromptError
from janus_modular.errors import JournalError
from janus_modular.janus import Janus
from janus_modular.model.session import TorchSession
from janus_modular.serving import AnswerRequest, DrawRequest, Engine, Progress, row_view, work
from janus_modular.serving import engine as engine_module
from janus_modular.serving.drawing_record import DrawingRecord, plain
from janus_modular.serving.drawn_codes import CodeGraphs
from janus_modular.serving.journal import Journal
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


def write_lines(folder: Path, content: list[Any]) -> None:
    [file] = folder.glob("*.jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in content))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each call of the graph that samples codes, from now on."""
    run, calls = TorchSession.run, list[int]()

    def counted(self: TorchSession, name: str, *inputs: Any) -> Any:
        if name == "sample_image":
            calls.append(len(inputs[1]))
        return run(self, name, *inputs)

    monkeypatch.setattr(TorchSession, "run", counted)
    return calls


def ids(folder: Path) -> set[str]:
    return {json.loads(file.read_text().splitlines()[0])["id"] for file in folder.glob("*.jsonl")}


def lines(folder: Path) -> list[Any]:
    [file] = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_drawing_of_a_killed_process_goes_on(tiny: Janus, tmp_path: Path) -> None:
    for codes in (3, 24):
        killed_while_drawing(tiny, tmp_path, codes)
        assert len(lines(tmp_path)) - 1 >= codes
    drawn = len(lines(tmp_path)) - 1
    with Engine(tiny, rows=4, journal=tmp_path) as engine:
        [job] = engine.resumed
        assert job.request_id == "first/.."
        first = next(event for event in job if isinstance(event, Progress))
        assert drawn // 2 < first.done <= drawn + 1  # the first of two images that goes on
        assert engine.stats().continued_codes == drawn
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


PHOTO = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
FROM_IMAGES = {"images": [PHOTO, Image.fromarray(PHOTO[:20])], "image_form": "both"}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="plain"),
        pytest.param({"settings": {"prefix": [3, 60]}}, id="prefix"),
        pytest.param({"temperature": 0.0}, id="greedy"),
        pytest.param(FROM_IMAGES, id="images"),
    ],
)
@pytest.mark.parametrize("drawn", [1, 9, 13])
def test_a_drawing_goes_on_from_its_codes(
    tiny: Janus, tmp_path: Path, drawn: int, change: dict[str, Any], sampled: list[int]
) -> None:
    """One image of two is begun, and one is complete but for the note that the drawing is done."""
    request = replace(REQUEST, **change)
    with Engine(tiny, journal=tmp_path) as engine:
        engine.submit(request).result(60)
    first, *codes, _ = lines(tmp_path)
    begun = [line for line in codes if line[0] == 0][:drawn]
    complete = [line for line in codes if line[0] == 1]
    write_lines(tmp_path, [first, *begun, *complete])
    sampled.clear()
    with Engine(tiny, journal=tmp_path) as engine:
        drawings = engine.resumed[0].result(60)
        assert engine.submit(request).result(60) == drawings  # the same request, images too
    assert sum(sampled) == len(codes) // 2 - drawn
    ensure_same(request, drawings, alone(tiny, request))
    assert sorted(map(str, lines(tmp_path))) == sorted(map(str, [first, *codes, "done"]))


def test_many_codes_are_read_in_parts_beside_other_requests(
    tiny: Janus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_view, "MOST_FED", 5)
    with Engine(tiny, journal=tmp_path) as engine:
        engine.submit(REQUEST).result(60)
    first, *codes, _ = lines(tmp_path)
    write_lines(tmp_path, [first, *codes[:-7]])
    with Engine(tiny, journal=tmp_path) as engine:
        question = AnswerRequest("hello", max_new_tokens=9)
        answer = engine.submit(question)
        for job, request in ((engine.resumed[0], REQUEST), (answer, question)):
            ensure_same(request, job.result(60), alone(tiny, request))


@pytest.mark.parametrize("model", ["another", None])
def test_a_drawing_of_another_model_is_drawn_again(
    tiny: Janus,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    model: str | None,
    sampled: list[int],
) -> None:
    """Its codes would make an image that neither model draws."""
    with Engine(tiny, journal=tmp_path) as engine:
        engine.submit(REQUEST).result(60)
    first, *codes, _ = lines(tmp_path)
    others = [[image, (code + 1) % 64] for image, code in codes]
    for last in ([], ["done"]):
        write_lines(tmp_path, [{**first, "model": model}, *others, *last])
        caplog.clear()
        with Engine(tiny, journal=tmp_path) as engine:
            assert len(engine.resumed) == (not last)
            ensure_same(REQUEST, engine.submit(REQUEST).result(60), alone(tiny, REQUEST))
            assert "drawn again from its seed: another model began it" in caplog.text
        sampled.clear()
        with Engine(tiny, journal=tmp_path) as engine:
            drawings = engine.submit(REQUEST).result(60)
        assert not sampled
        ensure_same(REQUEST, drawings, alone(tiny, REQUEST))


@pytest.mark.parametrize("lacks", ["codes", "graph", "settings", "fingerprint"])
def test_a_model_that_cannot_go_on_draws_again_and_says_why(
    tiny: Janus,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    lacks: str,
    sampled: list[int],
) -> None:
    with Engine(tiny, journal=tmp_path) as engine:
        engine.submit(REQUEST).result(60)
    write_lines(tmp_path, lines(tmp_path)[:-5])
    if lacks == "codes":
        monkeypatch.setattr(CodeGraphs, "of", lambda _: None)
    elif lacks == "graph":
        graphs = CodeGraphs.of(tiny.runtime.open(8).signatures)
        assert graphs is not None
        monkeypatch.setattr(CodeGraphs, "of", lambda _: replace(graphs, can_embed=False))
    elif lacks == "settings":
        monkeypatch.setattr(work, "CodeSamplerSettings", type("Other", (), {}))
    else:
        monkeypatch.setattr(engine_module, "Fingerprinted", type("Other", (), {}))
    sampled.clear()
    with Engine(tiny, journal=tmp_path) as engine:
        drawings = engine.resumed[0].result(60)
    assert sum(sampled) >= 32  # joined calls are compared with calls alone, the first time
    ensure_same(REQUEST, drawings, alone(tiny, REQUEST))
    assert "drawn again from its seed" in caplog.text
    assert {"codes": "code by code", "graph": "embeds codes", "settings": "CodeSamplerSettings"}.get(
        lacks, lacks
    ) in caplog.text


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
def test_a_drawing_goes_on_though_its_disk_is_full(
    tiny: Janus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A journal's file is a link to the device whose writes fail as those of a full disk."""
    begin = Journal.begin

    def full(self: Journal, request_id: str, request: DrawRequest) -> DrawingRecord:
        record = begin(self, request_id, request)
        if request_id == "first/..":
            record.file.unlink()
            record.file.symlink_to("/dev/full")
        return record

    monkeypatch.setattr(Journal, "begin", full)
    with Engine(tiny, rows=4, journal=tmp_path) as engine:
        other = engine.submit(DrawRequest("a cat"))
        ensure_same(REQUEST, engine.submit(REQUEST).result(60), alone(tiny, REQUEST))
        assert other.result(60)
    assert caplog.text.count("cannot be written: [Errno 28] No space left") == 1
    assert len(lines(tmp_path)) == 2 + 16  # of the other


def limited(size: int) -> Any:
    """Return a context in which this process writes files of ``size`` bytes at most."""

    @contextmanager
    def context() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return context()


@pytest.mark.parametrize("size", [*range(0, 190, 27), 260, 300])
def test_a_line_is_written_as_a_whole_or_not_at_all(tmp_path: Path, size: int) -> None:
    """Writes are cut off after any number of bytes, as they are on a disk that fills up."""
    journal = Journal(tmp_path, "model")
    record = None
    with limited(size), suppress(JournalError):
        record = journal.begin("a", DrawRequest("a"))
        for code in range(40):
            record.add(0, code)
    files = [*tmp_path.glob("*.jsonl")]
    assert len(files) == (record is not None)
    if record is not None:
        again = DrawingRecord.read(record.file)
        assert record.is_broken
        assert again.codes.get(0, []) == [*range(again.count)]
        assert record.file.read_bytes()[-1:] == b"\n"
        journal.finish(record)
        assert not record.file.exists()
    assert journal.begin("a", DrawRequest("a")).count == 0
    journal.close()


def test_finished_drawings_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, most_done=3)
    for name in "abcde":
        journal.finish(journal.begin(name, DrawRequest(name)))
    opened = journal.begin("c", DrawRequest("c"))  # is used again: it is not removed
    journal.finish(journal.begin("f", DrawRequest("f")))
    journal.finish(journal.begin("g", DrawRequest("g")))
    assert ids(tmp_path) == set("cefg")
    assert opened.is_done
    journal.finish(opened)
    assert ids(tmp_path) == set("cfg")
    create, failures = DrawingRecord.create, [OSError(errno.ENOSPC, "full")]

    def fails_once(self: DrawingRecord) -> None:
        if failures:
            raise JournalError("full") from failures.pop()
        create(self)

    monkeypatch.setattr(DrawingRecord, "create", fails_once)
    journal.begin("h", DrawRequest("h"))
    assert ids(tmp_path) == {"h"}
    journal.close()
    journal = Journal(tmp_path, most_bytes=300)
    journal.open_records()
    for name in "hijk":
        journal.finish(journal.begin(name, DrawRequest(name)))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.jsonl")) <= 300
    assert "k" in ids(tmp_path)
    journal.close()


HEAD = json.dumps({"id": "a", "request": plain(DrawRequest("a"))}) + "\n"


@pytest.mark.parametrize(
    "content",
    ["[]\n", "{}\n", '{"id": "a"}\n[1\n', "\x00\n", HEAD + "[0]\n", HEAD + '[0, "1"]\n', HEAD + "[0, []]\n"],
)
def test_a_damaged_file_is_renamed(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    """A crash of the whole machine may leave one; the others go on."""
    (tmp_path / "a.jsonl").write_text(content)
    journal = Journal(tmp_path)
    journal.begin("b", DrawRequest("b"))
    assert [record.request_id for record in journal.open_records()] == ["b"]
    assert "a.jsonl is damaged" in caplog.text
    assert (tmp_path / "a.damaged").read_text() == content
    journal.close()


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
    record.add(0, np.int64(3))
    with record.file.open("ab") as file:
        file.write(b"[0, 1")
    (tmp_path / "begun.jsonl").write_bytes(b'{"id": "b", "requ')
    [again] = journal.open_records()
    assert again.codes == {0: [3]}
    assert again.request.settings == {"prefix": [3, 4]}
    assert not (tmp_path / "begun.jsonl").exists()
    again.add(0, 7)
    assert DrawingRecord.read(again.file).codes == {0: [3, 7]}
    journal.close()


def test_a_journal_has_one_engine(tiny: Janus, tmp_path: Path) -> None:
    with Engine(tiny, journal=tmp_path), pytest.raises(JournalError, match="another process is writing"):
        Engine(tiny, journal=tmp_path)
