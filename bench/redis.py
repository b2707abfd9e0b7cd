"""A redis-server that is written to while it moves: what its client sees."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import redisload
from bench.live import Sizes, ways_text
from bench.numbers import Missing, Result, percentile, result, size_text
from bench.place import ROOT, Flyer, Place, Started, inside
from bench.writer import Flight
from godwit.api import Report
from godwit.types import OwnedFd

LIMIT_MS = 15.0
PER_SECOND = 2000
_PORT = 7379
_FIXED = (
    "--save",
    "",
    "--appendonly",
    "no",
    "--protected-mode",
    "no",
    "--bind",
    "0.0.0.0",
    "--dir",
    "/shared",
)
_STILL_S = 3.0
_NOTE = (
    f"{PER_SECOND} SETs of {redisload.VALUE_BYTES} bytes a second to random keys, one at a time, by a client"
    " in Python in the first node; the move is `--strategy auto --tcp-close`; without an answer for"
    f" {redisload.LATE_MS} ms the client asks at the other node's address as well, for addresses do not move"
    " along"
)


@dataclass(frozen=True, slots=True)
class _Window:
    """A time of which the client's answers count."""

    since_ns: int
    until_ns: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the client has seen in a window, in ms."""

    from_due: list[float]
    from_sent: list[float]


def moved(place: Place, sizes: Sizes) -> Iterator[Result | Missing]:
    """Measure the answers of a server while it moves."""
    name = f"redis {size_text(sizes.large_mib)}"
    if shutil.which("redis-server") is None:
        yield Missing(name=name, why="redis-server is not installed")
        return
    argv = ["redis-server", "--port", str(_PORT), *_FIXED]
    with Flyer(place, argv, lambda said: "Ready to accept connections" in said) as flyer:
        keys = _word(place, flyer, "fill", sizes.large_mib)["keys"]
        answers = place.lab.shared / "answers.json"
        reports: list[Report] = []
        windows: list[_Window] = []
        with _writing(place, keys, answers):
            flyer.hop("auto", quietly=False, tcp_close=True)
            still = _window_of(lambda: _pause(_STILL_S))
            for _ in range(sizes.large_runs):
                windows.append(_window_of(lambda: reports.append(_hop(flyer))))
                _pause(0.3)
        _word(place, flyer, "verify", keys)
        seen = _read(answers, [still, *windows])
    yield from _results(name, seen[0], seen[1:], reports)


def _hop(flyer: Flyer) -> Report:
    return flyer.hop("auto", quietly=False, tcp_close=True)


def _results(name: str, still: _Seen, moves: list[_Seen], reports: list[Report]) -> Iterator[Result]:
    freezes = [report.freeze_ms for report in reports]
    flights = [Flight(report=report, gap_ms=0) for report in reports]
    yield result(f"freeze, {name}", "ms", freezes, note=ways_text(flights))
    yield result(
        f"{name}: p99.9, not moved",
        "ms",
        [percentile(still.from_sent, 99.9)],
        note=f"limit: {_STILL_S:.0f} s",
    )
    counts = sorted(len(each.from_due) for each in moves)
    asked = f"{_NOTE}; {counts[0]} to {counts[-1]} answers in a move, from the command's start to its end"
    sent = [percentile(each.from_sent, 99.9) for each in moves]
    yield result(f"{name}: p99.9 during the move, since it was sent", "ms", sent, limit=LIMIT_MS, note=asked)
    due = [percentile(each.from_due, 99.9) for each in moves]
    note = "the same from when it should have been sent: what waits behind a late answer counts too"
    yield result(f"{name}: p99.9 during the move, since it was due", "ms", due, limit=LIMIT_MS, note=note)
    yield result(f"{name}: worst during the move", "ms", [max(each.from_due) for each in moves])


def _word(place: Place, flyer: Flyer, word: str, number: int) -> dict[str, Any]:
    """Run a word of the client in node a."""
    address = place.lab.node(flyer.here).address
    return place.word("a", word, address, _PORT, number, module="bench.redisload")


@contextlib.contextmanager
def _writing(place: Place, keys: int, output: Path) -> Iterator[None]:
    """Have a client write all the while; its answers are in the file afterwards."""
    addresses = [node.address for node in place.lab.nodes]
    words: list[str | int] = [_PORT, keys, PER_SECOND, f"/shared/{output.name}", *addresses]
    read, write = os.pipe2(os.O_CLOEXEC)
    with OwnedFd(read) as stdin, OwnedFd(write) as end:
        argv = inside("write", *words, module="bench.redisload")
        started = Started(place.lab.node("a"), argv, cwd=str(ROOT), stdin=stdin.number)
        with started:
            started.line()
            yield
            end.close()
            started.wait_for_end()


def _window_of(work: Callable[[], object]) -> _Window:
    since_ns = time.time_ns()
    work()
    return _Window(since_ns, time.time_ns())


def _read(answers: Path, windows: list[_Window]) -> list[_Seen]:
    seen = [_Seen([], []) for _ in windows]
    for due_ns, from_due, from_sent in json.loads(answers.read_text()):
        for window, into in zip(windows, seen, strict=True):
            if window.since_ns <= due_ns < window.until_ns:
                into.from_due.append(from_due)
                into.from_sent.append(from_sent)
    if not all(each.from_due for each in seen):
        raise RuntimeError("the client had no answer in a move")
    return seen


def _pause(seconds: float) -> None:
    select.select([], [], [], seconds)
