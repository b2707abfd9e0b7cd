"""The moves that are measured."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench import limits
from bench.numbers import KIB, MIB, Growth, Result, growth, result, size_text
from bench.place import Flyer, Place
from bench.resident import Watch
from godwit.api import Report

SMALL_MIB = 4
FREEZE_MS = 10.0
NUMPY_FREEZE_MS = 15.0
GIB_RATIO = 1.5
HELP_MS = 150.0
RESIDENT_MIB = 60.0
_NUMPY = "import numpy, signal; a = numpy.ones(1000); print('ready', flush=True); signal.pause()"
_GODWIT = "from godwit.cli.main import main; main()"  # what the installed script does
_WITHOUT_PAGES = (
    "the freeze minus the destination's step `pages`: from the decoded tree to the last page written"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One thing a process may have many of."""

    name: str
    keyword: str  # of Place.subject
    counts: tuple[int, ...]
    per_count: int = 1  # items for each count


AXES = (
    Axis(name="page", keyword="mib", counts=(1, 16, 64), per_count=256),
    Axis(name="mapping", keyword="vmas", counts=(10, 100, 1000)),
    Axis(name="descriptor", keyword="fds", counts=(10, 100, 1000)),
    Axis(name="thread", keyword="threads", counts=(1, 10, 50, 200)),
    Axis(name="process", keyword="processes", counts=(1, 5, 20, 50)),
)


def step(report: Report, name: str) -> float:
    """Return the ms of a step of a report."""
    return dict(report.steps)[name]


def _hops(flyer: Flyer, runs: int) -> list[Report]:
    """Move it so many times, and once before that does not count."""
    flyer.hop()
    return [flyer.hop() for _ in range(runs)]


def steps_text(reports: Sequence[Report]) -> str:
    """Return the median of each step, of the moves that had it."""
    took: dict[str, list[float]] = {}
    for report in reports:
        for name, ms in report.steps:
            took.setdefault(name, []).append(ms)
    return ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in took.items())


def small(place: Place, runs: int) -> Iterator[Result]:
    """Measure the freeze of a small C program."""
    with place.subject(mib=SMALL_MIB) as flyer:
        reports = _hops(flyer, runs)
    freezes = [report.freeze_ms for report in reports]
    note = f"median steps in ms: {steps_text(reports)}"
    yield result(f"freeze, C, {SMALL_MIB} MiB", "ms", freezes, limit=FREEZE_MS, note=note)
    yield result(f"whole move, C, {SMALL_MIB} MiB", "ms", [report.total_ms for report in reports])


def numpy(place: Place, runs: int) -> Iterator[Result]:
    """Measure the freeze of an idle Python with numpy."""
    with Flyer(place, [sys.executable, "-c", _NUMPY]) as flyer:
        reports = _hops(flyer, runs)
    mib = reports[0].pages * 4096 / MIB
    freezes = [report.freeze_ms for report in reports]
    yield result("freeze, Python with numpy", "ms", freezes, note=f"{mib:.0f} MiB of pages")
    without = [report.freeze_ms - step(report, "destination pages") for report in reports]
    yield result(
        "freeze, Python with numpy, without its memory",
        "ms",
        without,
        limit=NUMPY_FREEZE_MS,
        note=_WITHOUT_PAGES,
    )


def gibibyte(place: Place, runs: int) -> Iterator[Result]:
    """Measure the move of 1 GiB, each time beside what the machine needs for the same bytes."""
    plain, tls, touch, total = [], [], [], []
    with place.subject(mib=KIB) as flyer:
        flyer.hop()
        for _ in range(runs):
            plain.append(limits.send_ms(place, "plain"))
            tls.append(limits.send_ms(place, "tls"))
            touch.append(limits.touch_ms())
            total.append(flyer.hop().total_ms)
    yield result("send 1 GiB between two nodes", "ms", plain, note="limit: TCP over veth, one touched buffer")
    yield result("send 1 GiB by mutual TLS", "ms", tls, note="limit: the same, TLS 1.3")
    yield result("touch 1 GiB of fresh memory", "ms", touch, note="limit")
    yield result("whole move, C, 1 GiB", "ms", total)
    for name, sent in (("plain send", plain), ("TLS send", tls)):
        ratios = [
            moved / (sending + touching) for moved, sending, touching in zip(total, sent, touch, strict=True)
        ]
        yield result(f"1 GiB moved / ({name} + touch)", "x", ratios, limit=GIB_RATIO)


def resident(place: Place, mib: int, runs: int) -> Iterator[Result]:
    """Measure the highest resident memory of both ends."""
    sources, destinations = [], []
    with place.subject(mib=mib) as flyer:
        for number in range(runs):
            with Watch(place) as watch:
                flyer.hop()
            source, destination = ("a", "b") if number % 2 == 0 else ("b", "a")
            sources.append(watch.peak_kib[source] / KIB)
            destinations.append(watch.peak_kib[destination] / KIB)
    size = size_text(mib)
    yield result(f"resident at the source, {size}", "MiB", sources, limit=RESIDENT_MIB)
    yield result(f"resident at the destination, {size}", "MiB", destinations, limit=RESIDENT_MIB)


def grows(place: Place, axis: Axis, runs: int) -> Growth:
    """Measure how the freeze grows along an axis."""
    freezes = []
    for count in axis.counts:
        with place.subject(**{axis.keyword: count}) as flyer:
            freezes.append([report.freeze_ms for report in _hops(flyer, runs)])
    return growth(axis.name, [count * axis.per_count for count in axis.counts], freezes)


def command_line(runs: int) -> Iterator[Result]:
    """Measure how fast the command answers."""
    yield result("start of Python", "ms", limits.python_start_ms(runs), note="limit")
    command = [sys.executable, "-c", _GODWIT, "--help"]
    yield result("godwit --help", "ms", limits.command_ms(command, runs), limit=HELP_MS)


def small_limits(place: Place, runs: int) -> Iterator[Result]:
    """Measure the machine's other limits."""
    yield result(
        "round trip between two nodes", "µs", limits.round_trips_us(place), note="limit: one byte by TCP"
    )
    reads = [limits.read_foreign_ms() for _ in range(runs)]
    yield result("read 1 GiB of another process", "ms", reads, note="limit: process_vm_readv, a MiB each")
