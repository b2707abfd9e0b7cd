"""What it costs a program to be watched: its speed while its writes are noted, and without."""

from __future__ import annotations

import contextlib
import mmap
import select
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import quiet
from bench.numbers import Result, result
from bench.place import BUILD
from godwit.engine import tracking, view
from godwit.engine.ranges import Ranges
from godwit.engine.tracking import Tracked, Watch
from godwit.types import PAGE_SIZE, Pid

LIMIT_PERCENT = 15.0
PAGES = 50_000
PER_SECOND = 100_000
_SCANS = 8  # in a measurement
_WARM_PASSES = 3


@dataclass(frozen=True, slots=True)
class _Mark:
    """How far the program is at a moment."""

    writes: int
    seconds: float
    cpu_seconds: float  # of its own processor time

    def speed_since(self, before: _Mark) -> float:
        return (self.writes - before.writes) / (self.seconds - before.seconds)

    def cpu_speed_since(self, before: _Mark) -> float:
        return (self.writes - before.writes) / (self.cpu_seconds - before.cpu_seconds)


@dataclass(frozen=True, slots=True)
class _Toucher:
    pid: Pid
    counter: mmap.mmap

    def mark(self) -> _Mark:
        # proc_pid_schedstat(5): nanoseconds on a processor come first.
        on_cpu_ns = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0])
        return _Mark(self.written(), time.monotonic(), on_cpu_ns / 1e9)

    def written(self) -> int:
        return int(struct.unpack_from("=Q", self.counter)[0])


@dataclass(frozen=True, slots=True)
class _Speed:
    """Writes per second, and per second of processor time."""

    wall: float
    cpu: float

    @classmethod
    def between(cls, before: _Mark, after: _Mark) -> _Speed:
        return cls(after.speed_since(before), after.cpu_speed_since(before))


@dataclass(slots=True)
class _Watched:
    """What the watch has told, a number for each measurement."""

    pages_per_s: list[float] = field(default_factory=list[float])
    scan_ms: list[float] = field(default_factory=list[float])


def slowdown(runs: int) -> Iterator[Result]:
    """Measure how much slower a program is whose writes are noted, at PER_SECOND distinct pages a second."""
    losses: list[float] = []
    cpu_losses: list[float] = []
    watched = _Watched()
    with _toucher() as toucher:
        for _ in range(runs):
            before = _speed(toucher)
            during = _speed_while_watched(toucher, watched)
            # Once more without, so that a machine that gets faster or slower meanwhile counts for nothing.
            after = _speed(toucher)
            losses.append(100 * (1 - 2 * during.wall / (before.wall + after.wall)))
            cpu_losses.append(100 * (1 - 2 * during.cpu / (before.cpu + after.cpu)))
    note = (
        f"a C program writes a word to each of {PAGES} pages of 4 KiB over and over, in a scattered order,"
        f" as fast as it can; the watch scans and protects them every {1000 * PAGES // PER_SECOND} ms, each"
        f" being told once in each scan; its writes per second during {_SCANS} scans are compared with those"
        " in the same time before and after, without a watch;"
        f" {statistics.median(watched.pages_per_s):.0f} distinct pages a second were told, a scan took"
        f" {statistics.median(watched.scan_ms):.1f} ms"
    )
    yield result("slowdown while tracked, 100k distinct pages/s", "%", losses, limit=LIMIT_PERCENT, note=note)
    note = "the same from writes per second of the program's own processor time: what others take is left out"
    yield result("slowdown while tracked, by processor time", "%", cpu_losses, note=note)


@contextlib.contextmanager
def _toucher() -> Iterator[_Toucher]:
    BUILD.mkdir(parents=True, exist_ok=True)
    program, counter = BUILD / "toucher", BUILD / "written"
    subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("toucher.c")], check=True)
    counter.write_bytes(bytes(PAGE_SIZE))
    quiet.wait()
    with (
        counter.open("r+b") as file,
        mmap.mmap(file.fileno(), PAGE_SIZE) as shared,
        subprocess.Popen([program, counter, str(PAGES)], stdin=subprocess.DEVNULL) as process,
    ):
        try:
            toucher = _Toucher(Pid(process.pid), shared)
            _warm_up(toucher)
            yield toucher
        finally:
            process.kill()


def _speed(toucher: _Toucher) -> _Speed:
    """Measure a program that nobody watches."""
    before = toucher.mark()
    _pause(_SCANS * PAGES / PER_SECOND)
    return _Speed.between(before, toucher.mark())


def _speed_while_watched(toucher: _Toucher, watched: _Watched) -> _Speed:
    """Measure it while it is scanned at even intervals, from the first protection to the last scan."""
    with contextlib.closing(Watch()) as watch:
        process = view.look(toucher.pid, view.Memory()).root
        watch.update(toucher.pid, [process], lambda _: None)
        tracked = watch.of(process)
        assert tracked is not None
        spans, backed = tracking.spans_of(process), tracking.backed_of(process)
        _scan(tracked, spans, backed)
        pages, scanning_s = 0, 0.0
        before = toucher.mark()
        for number in range(1, _SCANS + 1):
            _pause(before.seconds + number * PAGES / PER_SECOND - time.monotonic())
            started = time.monotonic()
            pages += _scan(tracked, spans, backed)
            scanning_s += time.monotonic() - started
        after = toucher.mark()
    watched.pages_per_s.append(pages / (after.seconds - before.seconds))
    watched.scan_ms.append(1000 * scanning_s / _SCANS)
    return _Speed.between(before, after)


def _scan(tracked: Tracked, spans: Ranges, backed: Ranges) -> int:
    """Scan and protect; return how many pages were told."""
    found = tracked.scan(spans, backed, protect=True)
    return sum(end - start for start, end in found.dirty) // PAGE_SIZE


def _pause(seconds: float) -> None:
    select.select([], [], [], max(seconds, 0.0))


def _warm_up(toucher: _Toucher) -> None:
    deadline = time.monotonic() + 30
    while toucher.written() < _WARM_PASSES * PAGES:
        if time.monotonic() > deadline:
            raise RuntimeError("the program writes nothing")
        _pause(0.01)
