"""Loads a server with mixed requests, and breaks what can break: prints a table, and writes it to a page.

    python bench/reliability.py [--out docs/reliability.md]

The model is the tiny one with random weights, in torch and exported. Everything stays on this machine. The
load ends after ``--seconds``, however slow the machine is, and the table says how many requests there were.
Every answer is compared with that of the same request alone, without a server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from served_models import (
    FAULT,
    Case,
    Client,
    Model,
    ServerProcess,
    alone,
    bad_bodies,
    cases,
    client_of,
    gathered,
    make_tiny,
)

MARKS = "<!-- figures of bench/reliability.py -->", "<!-- end of figures -->"
"""Between these, a page has the table."""

POSITIONS = 16
"""Codes of an image of the tiny model."""

CHECKS = ["load", "bad_requests", "sigterm", "kills", "full_disk"]

WARM_UP = 0.25
"""Share of the load after which memory should not grow."""


@dataclass
class Report:
    """What was checked of one model."""

    model: Model
    rows: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, found: str, *, is_good: bool) -> None:
        """Add a row, and print it."""
        self.rows[name] = found if is_good else f"**{found}**"
        if not is_good:
            self.failures.append(f"{self.model.name}: {name}: {found}")
        print(f"{self.model.name:12} {'ok  ' if is_good else 'FAIL'} {name}: {found}", flush=True)


@dataclass
class Bench:
    """The checks of one model."""

    options: argparse.Namespace
    report: Report
    folder: Path
    pool: list[Case]
    expected: list[Any]

    def server(self, **settings: Any) -> ServerProcess:
        """Start a server."""
        return ServerProcess(
            self.report.model, self.folder / f"{len(list(self.folder.iterdir()))}.log", **settings
        )

    async def verified(self, client: Client, number: int, request_id: str | None = None) -> str:
        """Send a request of the pool; return "" if the answer is what the request gives alone."""
        try:
            result = await client.result(self.pool[number], request_id)
        except (ValueError, httpx.HTTPError) as error:
            return f"lost: {error!r:.200}"
        return "" if result == self.expected[number] else f"request {number}: found {result!r:.100}"

    async def load(self) -> None:
        """Send mixed requests from many clients: none lost, none doubled, every answer as alone."""
        server, options = self.server(), self.options
        end = time.monotonic() + options.seconds
        numbers = iter(range(options.requests))
        problems, memory, sent, jobs = list[str](), dict[int, int](), 0, 0

        async def one_client(client: Client) -> None:
            nonlocal sent, jobs
            for number in numbers:
                if time.monotonic() > end:
                    return
                sent, jobs = sent + 1, jobs + self.pool[number % len(self.pool)].jobs
                problems.append(await self.verified(client, number % len(self.pool)))
                memory[len(problems)] = server.memory

        async with client_of(server.address) as client:
            start = time.monotonic()
            await asyncio.gather(*(one_client(client) for _ in range(options.clients)))
            seconds = time.monotonic() - start
            await self.at_rest(client, "rows in use after the load")
            metrics = await client.metrics()
        ended = sum(metrics[f'janus_requests_total{{outcome="{name}"}}'] for name in ("answered", "drawn"))
        ended -= 1  # the answer that warms the server up; its drawing is cancelled
        bad = [problem for problem in problems if problem]
        add, name = self.report.add, f"requests from {options.clients} clients"
        add(name, f"{sent} in {seconds:.0f} s", is_good=sent == options.requests)
        add("lost, or another answer than alone", f"{len(bad)} {bad[:1] or ''}".strip(), is_good=not bad)
        add("computed twice, or not at all", f"{abs(ended - jobs):.0f}", is_good=ended == jobs)
        reused = metrics["janus_reused_positions_total"]
        add("positions of prompts reused", f"{reused:.0f}", is_good=reused > 0)
        warm = memory[max(1, int(len(memory) * WARM_UP))]
        growth = max(list(memory.values())[-max(1, len(memory) // 4) :]) / warm - 1
        add("memory after a quarter of the load", f"{warm / 1e6:.0f} MB", is_good=True)
        add("its growth until the end", f"{growth:+.1%}", is_good=options.no_memory or growth <= 0.05)
        server.terminate()

    async def at_rest(self, client: Client, name: str) -> None:
        """Check that nothing is left in the batch."""
        for _ in range(100):
            metrics = await client.metrics()
            free = metrics['janus_rows{mode="free"}']
            left = metrics["janus_requests_running"] + metrics["janus_requests_waiting"] + 16 - free
            if not left:
                break
            await asyncio.sleep(0.1)
        self.report.add(name, f"{left:.0f}", is_good=not left)

    async def bad_requests(self) -> None:
        """Let clients and requests misbehave beside good requests."""
        server, count = self.server(), self.options.faults
        async with client_of(server.address) as client:
            good = [partial(self.verified, client, i % len(self.pool)) for i in range(2 * count)]
            bad = {
                "clients that vanished in a stream": self.vanish,
                "bodies refused": self.malformed,
                "requests that raised in a graph": self.raising,
            }
            sorts = {"good requests beside the faults": good}
            sorts |= {name: [partial(act, client, i) for i in range(count)] for name, act in bad.items()}
            calls = [(name, call) for name, members in sorts.items() for call in members]
            random.Random(0).shuffle(calls)
            outcomes: dict[str, list[Any]] = {name: [] for name in sorts}

            async def one_client() -> None:
                while calls:
                    name, call = calls.pop()
                    outcomes[name] += await gathered([call()])

            await asyncio.gather(*(one_client() for _ in range(self.options.clients)))
            for name, results in outcomes.items():
                wrong = [result for result in results if result]
                found = f"{len(results) - len(wrong)} of {len(results)} {wrong[:1] or ''}".strip()
                self.report.add(name, found, is_good=not wrong)
            await self.at_rest(client, "rows in use after the faults")
        server.terminate()

    async def vanish(self, client: Client, number: int) -> str:
        """Close a stream after its first event."""
        body = {"prompt": "gone", "seed": number, "n": 4, "stream": True, "partial_images": 1}
        async with client.http.stream("POST", "/v1/images/generations", json=body) as response:
            async for _ in response.aiter_bytes():
                break
        return "" if response.status_code == 200 else str(response.status_code)

    async def malformed(self, client: Client, number: int) -> str:
        """Send a body that must be refused."""
        bodies, path = bad_bodies(), "/v1/chat/completions"
        body, expected = bodies[number % len(bodies)]
        headers = {"content-type": "application/json"}
        with suppress(httpx.WriteError, httpx.RemoteProtocolError):  # refused before all of it was sent
            response = await client.http.post(path, content=body, headers=headers)
            return (
                "" if response.status_code == expected else f"{response.status_code}: {response.text[:100]}"
            )
        return ""

    async def raising(self, client: Client, number: int) -> str:
        """Send a request whose sampling raises."""
        messages = [{"role": "user", "content": f"fault {number}"}]
        body = {"messages": messages, "temperature": FAULT, "max_tokens": 4}
        response = await client.http.post("/v1/chat/completions", json=body)
        return "" if response.status_code == 500 else f"{response.status_code}: {response.text[:100]}"

    async def sigterm(self) -> None:
        """End a server while it draws: what it has begun, it finishes."""
        server = self.server()
        drawings = [i for i, case in enumerate(self.pool) if "prompt" in case.body]
        async with client_of(server.address) as client:
            tasks = [asyncio.create_task(self.verified(client, number)) for number in drawings[:16]]
            while True:
                metrics = await client.metrics()
                done = sum(task.done() for task in tasks)
                if metrics["janus_requests_running"] + metrics["janus_requests_waiting"] + done >= len(tasks):
                    break
            left, start = len(tasks) - done, time.monotonic()
            status = await asyncio.to_thread(server.terminate)
            seconds = time.monotonic() - start
            wrong = [result for result in await gathered(tasks) if result]
        found = f"{left} drawings, {len(wrong)} wrong or lost {wrong[:1] or ''}".strip()
        self.report.add("open at SIGTERM", found, is_good=not wrong)
        self.report.add("exit after SIGTERM", f"status {status} in {seconds:.1f} s", is_good=status == -15)

    async def kills(self) -> None:
        """Kill a server while it draws, start it again, and send the same requests again."""
        journal, rng = self.folder / "journal", random.Random(0)
        drawings = [i for i, case in enumerate(self.pool) if "prompt" in case.body][:8]
        wrong, redone, continued, recorded, most = list[str](), 0, 0, 0, 0
        server = self.server(journal=str(journal))
        for number in range(self.options.kills):
            total = POSITIONS * sum(self.pool[i].body.get("n", 1) for i in drawings)
            target, before = rng.randrange(1, total * 3 // 4), codes_on_disk(journal)
            async with client_of(server.address) as client:
                sent = [
                    asyncio.create_task(self.verified(client, i, request_id=f"kill-{number}-{i}"))
                    for i in drawings
                ]
                while sum(codes_on_disk(journal).values()) - sum(before.values()) < target:
                    await asyncio.sleep(0.005)
                server.kill()
                await gathered(sent)
            ids = {f"kill-{number}-{i}": i for i in drawings}
            begun = {name: count for name, count in open_codes(journal).items() if name in ids}
            server = self.server(journal=str(journal))
            async with client_of(server.address) as client:
                results = await gathered(
                    self.verified(client, i, request_id=f"kill-{number}-{i}") for i in drawings
                )
                metrics = await client.metrics()
            wrong += [result for result in results if result]
            taken = int(metrics["janus_continued_codes_total"])
            finished = {name: count for name, count in codes_on_disk(journal).items() if name in begun}
            drawn_after = sum(finished.values()) - sum(begun.values())
            needed = POSITIONS * sum(self.pool[ids[name]].body.get("n", 1) for name in begun)
            extra = drawn_after - (needed - sum(begun.values()))
            redone, most = redone + extra, max(most, extra)
            continued, recorded = continued + taken, recorded + sum(begun.values())
        add = self.report.add
        add("kills, with 8 drawings open", str(self.options.kills), is_good=True)
        add("images lost or changed by them", f"{len(wrong)} {wrong[:1] or ''}".strip(), is_good=not wrong)
        add("codes on disk at the kills", str(recorded), is_good=recorded > 0)
        add(
            "codes taken from the journal, of finished drawings too",
            str(continued),
            is_good=continued >= recorded,
        )
        add("codes drawn again after the kills", str(redone), is_good=most <= 8)
        server.terminate()

    async def full_disk(self) -> None:
        """Limit the size of every file, the log's too: drawings go on or are refused, answers are given."""
        for name, size in (("the log and codes", 500), ("the log and new drawings", 100)):
            folder = self.folder / f"full-{size}"
            server = self.server(journal=str(folder), file_bytes=size)
            async with client_of(server.address) as client:
                numbers = range(min(24, len(self.pool)))
                results = await gathered(self.verified(client, i) for i in numbers)
                refused = [result for result in results if "503" in result]
                wrong = [result for result in results if result and result not in refused]
                good = sum(not result for result in results)
                found = (
                    f"{good} answered, {len(refused)} refused, {len(wrong)} wrong {wrong[:1] or ''}".strip()
                )
                self.report.add(f"no space for {name}", found, is_good=not wrong and good > 0)
                await self.at_rest(client, f"rows in use after {name}")
            server.terminate()
            torn = [file for file in folder.glob("*.jsonl") if not file.read_bytes().endswith(b"\n")]
            self.report.add(f"half records for {name}", str(len(torn)), is_good=not torn)


def codes_on_disk(journal: Path) -> dict[str, int]:
    """Return the codes of each request in a journal, by its id."""
    return {name: count for name, (count, _) in records(journal).items()}


def open_codes(journal: Path) -> dict[str, int]:
    """Return the codes of each request that is not done."""
    return {name: count for name, (count, is_done) in records(journal).items() if not is_done}


def records(journal: Path) -> dict[str, tuple[int, bool]]:
    """Return the number of codes, and whether it is done, of each request in a journal."""
    found = {}
    for file in journal.glob("*.jsonl"):
        content = b""
        with suppress(FileNotFoundError):  # a cancelled drawing: that which warms a server up
            content = file.read_bytes()
        first, *lines = content.split(b"\n")[:-1] or [b""]
        if first:
            codes = sum(line.startswith(b"[") for line in lines)
            found[json.loads(first)["id"]] = codes, b'"done"' in lines
    return found


def models(options: argparse.Namespace, folder: Path) -> list[Model]:
    """Return the models to be served: the given ones, or the tiny one with random weights."""
    checkpoint, bundle = options.checkpoint or folder / "checkpoint", options.bundle
    if "onnx" in options.only and bundle is None:
        bundle = folder / "bundle"
    if not (checkpoint.exists() and (bundle is None or bundle.exists())):
        make_tiny(checkpoint, bundle)
    found = {"torch": Model("torch", checkpoint, None)}
    if bundle is not None:
        found["onnx"] = Model("ONNX Runtime", bundle, {"name": "onnx", "threads": 1})
    return [found[name] for name in options.only]


def table(reports: Sequence[Report], seconds: float) -> str:
    """Return the figures of all models, with their date, commit and machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    with suppress(OSError):
        [name, *_] = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    machine = f"{name.partition(': ')[2]}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}, {machine}, load {os.getloadavg()[1]:.0f},"
        f" {seconds / 60:.0f} minutes:",
        "",
        f"| | {' | '.join(report.model.name for report in reports)} |",
        f"| --- |{' --- |' * len(reports)}",
    ]
    for row in reports[0].rows:
        lines.append(f"| {row} | {' | '.join(report.rows.get(row, '') for report in reports)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> list[Report]:
    """Check all models; print a table, and write it. Return what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="default: the tiny model with random weights")
    parser.add_argument("--bundle", type=Path, help="default: an export of it")
    parser.add_argument("--only", nargs="*", default=["torch", "onnx"], choices=["torch", "onnx"])
    parser.add_argument("--checks", nargs="*", default=CHECKS, choices=CHECKS)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=900, help="most of the load, for each model")
    parser.add_argument("--faults", type=int, default=36, help="of each sort")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--no-memory", action="store_true", help="let memory grow: a load is too short")
    parser.add_argument("--out", type=Path, help="a page that has the marks of figures")
    options = parser.parse_args(words)
    start, reports, pool = time.monotonic(), list[Report](), cases(64)
    with tempfile.TemporaryDirectory() as temporary:
        for model in models(options, Path(temporary)):
            report = Report(model)
            reports.append(report)
            folder = Path(temporary) / f"{model.name} logs"
            folder.mkdir()
            bench = Bench(options, report, folder, pool, alone(model, pool))
            for check in options.checks:
                asyncio.run(getattr(bench, check)())
    text = table(reports, time.monotonic() - start)
    print(text)
    if options.out is not None:
        page = options.out.read_text("utf-8")
        before, after = page.partition(MARKS[0])[0], page.partition(MARKS[1])[2]
        options.out.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", "utf-8")
    return reports


if __name__ == "__main__":
    raise SystemExit(any(report.failures for report in main()))
