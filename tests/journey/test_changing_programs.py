"""Programs whose memory changes under whoever copies it, moved back and forth while they are at it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from godwit.lab.cluster import Lab
from tests.conftest import requires
from tests.journey.live import STRATEGIES, Live
from tests.journey.transfer import Program
from tests.workloads.driver import WORKLOADS

pytestmark = requires("root")

# More than their defaults, so that something changes in every millisecond of a move.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "mapper_c": ("rate=0",),
    "writer_c": ("rate=2000",),
    "forker_c": ("children=8", "life_ms=50"),
    "threader_c": ("threads=24", "life_us=100000"),
    "truncator_c": ("rate=0",),
    "kernelio_c": (),
}
WRITERS: dict[str, tuple[str, ...]] = {
    "huge pages": ("thp=1",),
    "a memfd": ("shared=1",),
    "a memfd of huge pages": ("shared=1", "thp=1"),
    "shared anonymous memory": ("shared=2",),
    "one that only reads": ("rate=0",),
}
ROUTE = ("b", "a")
# Each program once by each way in which its pages can go, before the freeze or after it; all others are slow.
EVERYDAY = {
    ("mapper_c", "precopy"),
    ("mapper_c", "hybrid"),
    ("writer_c", "auto"),
    ("writer_c", "hybrid"),
    ("forker_c", "precopy"),
    ("forker_c", "postcopy"),
    ("threader_c", "postcopy"),
    ("threader_c", "auto"),
    ("truncator_c", "precopy"),
    ("truncator_c", "postcopy"),
    ("kernelio_c", "hybrid"),
    ("kernelio_c", "auto"),
    ("huge pages", "hybrid"),
    ("a memfd", "precopy"),
    ("a memfd of huge pages", "postcopy"),
    ("shared anonymous memory", "auto"),
}


@pytest.fixture
def live(lab: Lab, shared: Path, strategy: str) -> Iterator[Live]:
    """Moves with that strategy."""
    transfer = Live(shared, lab, STRATEGIES[strategy])
    yield transfer
    transfer.close()


def product(names: Iterable[str]) -> list[ParameterSet]:
    """Join names with strategies; what is not for every day is marked slow."""
    return [
        pytest.param(
            name,
            strategy,
            marks=() if strategy == "stopcopy" or (name, strategy) in EVERYDAY else pytest.mark.slow,
            id=f"{name}-{strategy}",
        )
        for name in names
        for strategy in STRATEGIES
    ]


def fly(live: Live, name: str, options: tuple[str, ...], route: tuple[str, ...]) -> Program:
    reason = WORKLOADS[name].available()
    if reason is not None:
        pytest.skip(reason)
    program = live.start(name, options)
    for destination in route:
        live.move(program, destination)
    live.finish(program)
    return program


@pytest.mark.parametrize(("name", "strategy"), product(PROGRAMS))
def test_a_program_that_changes_all_the_time_acquits(live: Live, name: str) -> None:
    fly(live, name, PROGRAMS[name], ROUTE)


@pytest.mark.parametrize(("memory", "strategy"), product(WRITERS))
def test_an_array_of_every_kind_of_memory_acquits(live: Live, memory: str) -> None:
    fly(live, "writer_c", WRITERS[memory], ROUTE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_outage_that_a_program_sees_is_in_its_list(live: Live) -> None:
    program = fly(live, "writer_c", ("gap_ms=1",), ROUTE)
    lines = (program.running.dir / "gaps").read_text().splitlines()
    gaps_ns = sorted(int(end) - int(begin) for begin, end in map(str.split, lines))
    # The nodes share a clock. What was frozen cannot have ticked. What is told begins before the first thread
    # stands and ends when the answer is back, and on a busy machine that is milliseconds more.
    frozen_ms = sorted(float(report["freeze_ms"]) for report in program.reports)
    assert len(gaps_ns) >= len(frozen_ms)
    for seen_ns, told_ms in zip(gaps_ns[-len(frozen_ms) :], frozen_ms, strict=True):
        assert seen_ns >= told_ms * 1e6 * 0.5, f"{seen_ns} ns seen, {told_ms} ms told"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_changes_all_the_time_acquits_after_ten_times(live: Live, name: str) -> None:
    fly(live, name, PROGRAMS[name], ROUTE * 10)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_quarter_of_a_gibibyte_of_changing_mappings_acquits(live: Live) -> None:
    fly(live, "mapper_c", ("mib=256", "rate=0"), ROUTE * 3)
