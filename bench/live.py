"""Moves of running programs: how long they stand still, seen from outside and from inside."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench import cases, limits
from bench.numbers import GIB, KIB, MIB, Missing, Result, result, size_text
from bench.place import Place
from bench.resident import Watch
from bench.writer import Flight, Load, Writer

STRATEGIES = ("auto", "hybrid")
HUGE_RATIO = 1.5  # of the freeze of the large program
TOTAL_RATIO = 1.25
FAULT_RATIO = 3.0
HUGE_RESIDENT_MIB = 80.0
_SLOW_LINE_BYTES_PER_S = 64 * MIB
_FAULT_NOTE = (
    "the destination's time from the fault to the page in its place, median of a move's faults;"
    " one thread reads a random page every quarter of a millisecond"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the programs are, and how often each is moved by each strategy."""

    runs: int
    large_runs: int
    huge_runs: int  # 0: not at all
    large_mib: int = KIB
    huge_mib: int = 8 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A program, and how long it may stand still."""

    name: str
    load: Load
    runs: int
    limit_ms: float | None = None


def programs(sizes: Sizes) -> list[Case]:
    """Return the programs that are moved in every way, without the huge one and the idle large one."""
    large, size = sizes.large_mib, size_text(sizes.large_mib)
    runs = sizes.large_runs
    return [
        Case(name="4 MiB", load=Load(mib=4), runs=sizes.runs, limit_ms=5),
        Case(name="20 threads", load=Load(mib=64, rate=20, threads=20), runs=sizes.runs),
        Case(name=f"{size}, 64 MiB/s", load=Load(mib=large, rate=64), runs=runs, limit_ms=10),
        Case(name=f"{size}, 500 MiB/s", load=Load(mib=large, rate=500), runs=runs, limit_ms=20),
    ]


def freezes(place: Place, sizes: Sizes) -> Iterator[Result]:
    """Measure how long programs stand still."""
    for case in programs(sizes):
        for strategy, flights in _fly(place, case).items():
            yield from _standing(case, strategy, flights)


def large(place: Place, sizes: Sizes) -> Iterator[Result | Missing]:
    """Measure the idle large program, each time beside what the machine needs for the same; then the huge."""
    size = size_text(sizes.large_mib)
    case = Case(name=f"{size} idle", load=Load(mib=sizes.large_mib), runs=sizes.large_runs, limit_ms=10)
    sends: list[float] = []
    touches: list[float] = []

    def look() -> None:
        length_bytes = sizes.large_mib * MIB
        sends.append(limits.send_ms(place, "plain", length_bytes))
        touches.append(limits.touch_ms(length_bytes))

    flown = _fly(place, case, before_each=look)
    for strategy, flights in flown.items():
        yield from _standing(case, strategy, flights)
    totals = [flight.report.total_ms for flight in flown["auto"]]
    yield result(f"whole move, {case.name}, auto", "ms", totals, note=ways_text(flown["auto"]))
    yield result(f"send {size} between two nodes, beside it", "ms", sends, note="limit: plain TCP over veth")
    yield result(f"touch {size} of fresh memory, beside it", "ms", touches, note="limit")
    ratios = [total / max(send, touch) for total, send, touch in zip(totals, sends, touches, strict=True)]
    yield result(f"{size} idle moved / max(send, touch)", "x", ratios, limit=TOTAL_RATIO)
    yield from _huge(place, sizes, flown)


def _huge(place: Place, sizes: Sizes, beside: dict[str, list[Flight]]) -> Iterator[Result | Missing]:
    name = f"{size_text(sizes.huge_mib)} idle"
    free, need = limits.available_bytes(), 2 * sizes.huge_mib * MIB + GIB
    if sizes.huge_runs == 0:
        yield Missing(name=name, why="left out by an option")
        return
    if free < need:
        yield Missing(name=name, why=f"it needs {need / GIB:.1f} GiB free, there are {free / GIB:.1f}")
        return
    load = Load(mib=sizes.huge_mib)
    with Writer.start(place, load) as writer:
        flown = _hops(writer, sizes.huge_runs)
        resident: dict[str, list[float]] = {"source": [], "destination": []}
        for _ in range(min(sizes.huge_runs, 3)):
            source, destination = writer.flyer.here, writer.flyer.there
            with Watch(place) as watch:
                writer.hop("auto")
            resident["source"].append(watch.peak_kib[source] / KIB)
            resident["destination"].append(watch.peak_kib[destination] / KIB)
    for strategy, flights in flown.items():
        freeze = statistics.median(flight.report.freeze_ms for flight in beside[strategy])
        gap = statistics.median(flight.gap_ms for flight in beside[strategy])
        case = Case(name=name, load=load, runs=sizes.huge_runs)
        yield from _standing(case, strategy, flights, limits_ms=(HUGE_RATIO * freeze, HUGE_RATIO * gap))
    yield result(f"whole move, {name}, auto", "ms", [flight.report.total_ms for flight in flown["auto"]])
    for end, peaks in resident.items():
        yield result(f"resident at the {end}, {name}, auto", "MiB", peaks, limit=HUGE_RESIDENT_MIB)


def faults(place: Place, sizes: Sizes) -> Iterator[Result]:
    """Measure how long a program waits for a page that is still at the source."""
    trips = limits.round_trips_us(place)
    yield result("round trip, beside the faults", "µs", trips, note="limit: one byte by TCP there and back")
    limit_us = FAULT_RATIO * statistics.median(trips)
    mib = max(sizes.large_mib // 4, 4)
    ways: tuple[tuple[str, dict[str, float]], ...] = (
        ("the rest comes as fast as it can", {}),
        ("the rest comes at 64 MiB/s", {"bandwidth_bytes_per_s": float(_SLOW_LINE_BYTES_PER_S)}),
    )
    with Writer.start(place, Load(mib=mib, checks=1)) as writer:
        writer.hop("postcopy")
        for name, options in ways:
            reports = [writer.hop("postcopy", **options).report for _ in range(sizes.runs)]
            seen = statistics.median(report.faults for report in reports)
            note = f"{_FAULT_NOTE}; {size_text(mib)}, {seen:.0f} faults in a move"
            medians = [report.fault_median_us for report in reports]
            limit = None if options else limit_us
            yield result(f"fault, {name}", "µs", medians, limit=limit, note=note)
            worst = [report.fault_p99_us for report in reports]
            yield result(f"fault, {name}, p99", "µs", worst)


def _fly(place: Place, case: Case, before_each: Callable[[], None] = lambda: None) -> dict[str, list[Flight]]:
    with Writer.start(place, case.load) as writer:
        return _hops(writer, case.runs, before_each)


def _hops(
    writer: Writer, runs: int, before_each: Callable[[], None] = lambda: None
) -> dict[str, list[Flight]]:
    """Move it so many times by each strategy in turn, and once before that does not count."""
    writer.hop("auto")
    flown: dict[str, list[Flight]] = {strategy: [] for strategy in STRATEGIES}
    for _ in range(runs):
        before_each()
        for strategy, flights in flown.items():
            flights.append(writer.hop(strategy))
    return flown


def _standing(
    case: Case,
    strategy: str,
    flights: Sequence[Flight],
    limits_ms: tuple[float | None, float | None] | None = None,
) -> Iterator[Result]:
    freeze_limit_ms, gap_limit_ms = limits_ms or (case.limit_ms, case.limit_ms)
    reported = [flight.report.freeze_ms for flight in flights]
    yield result(
        f"freeze, {case.name}, {strategy}", "ms", reported, limit=freeze_limit_ms, note=ways_text(flights)
    )
    gaps = [flight.gap_ms for flight in flights]
    yield result(f"longest gap seen inside, {case.name}, {strategy}", "ms", gaps, limit=gap_limit_ms)


def ways_text(flights: Sequence[Flight]) -> str:
    """Say what the strategy came to."""
    counted = Counter(flight.report.strategy for flight in flights)
    ways = ", ".join(f"{way} {times} times" for way, times in counted.most_common())
    rounds = statistics.median(flight.report.rounds for flight in flights)
    sent = statistics.median(flight.report.bytes_sent for flight in flights) / MIB
    total = statistics.median(flight.report.total_ms for flight in flights)
    steps = cases.steps_text([flight.report for flight in flights])
    return f"{ways}; medians: {rounds:.0f} rounds, {sent:.0f} MiB sent, {total:.0f} ms in all; ms: {steps}"
