"""Programs whose memory changes under whoever copies it, moved back and forth while they are at it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from godwit.lab.cluster import Lab
from tests.conftest import requires
from tests.journey.transfer import GODWIT, MOVE_TIMEOUT_S, Flown, Program, complaint, environment
from tests.workloads.driver import WORKLOADS

pytestmark = requires("root")

# How memory is moved, as words for `godwit migrate`. A new strategy is a new name here.
STRATEGIES: dict[str, tuple[str, ...]] = {name: ("--strategy", name) for name in ("stopcopy",)}

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
BUSY, BUSY_TRIES = 8, 20  # "changes faster than it can be looked at; try again in a moment"


class Live(Flown):
    """Migrated in a lab with a strategy of the test's choice."""

    def __init__(self, base: Path, lab: Lab, words: Sequence[str]) -> None:
        super().__init__(base, lab)
        self.words = words

    def _move(self, program: Program, destination: str | None) -> None:
        assert destination is not None
        words = [*GODWIT, "migrate", str(program.pid), destination, "--json", *self.words]
        done = self._run(program, words)
        for _ in range(BUSY_TRIES):
            if done.returncode != BUSY:
                break
            program.running.wait_alive()
            done = self._run(program, words)
        assert done.returncode == 0, complaint(done) + self.log()
        self.arrived(program, json.loads(done.stdout), destination)

    def _run(self, program: Program, words: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        return self.lab.node(program.node).run(words, env=environment(), timeout_s=MOVE_TIMEOUT_S)


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> str:
    """Each strategy in turn."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def live(lab: Lab, shared: Path, strategy: str) -> Iterator[Live]:
    """Moves with that strategy."""
    transfer = Live(shared, lab, STRATEGIES[strategy])
    yield transfer
    transfer.close()


def fly(live: Live, name: str, options: tuple[str, ...], route: tuple[str, ...]) -> Program:
    reason = WORKLOADS[name].available()
    if reason is not None:
        pytest.skip(reason)
    program = live.start(name, options)
    for destination in route:
        live.move(program, destination)
    live.finish(program)
    return program


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_changes_all_the_time_acquits(live: Live, name: str) -> None:
    fly(live, name, PROGRAMS[name], ROUTE)


@pytest.mark.parametrize("memory", WRITERS)
def test_an_array_of_every_kind_of_memory_acquits(live: Live, memory: str) -> None:
    fly(live, "writer_c", WRITERS[memory], ROUTE)


def test_the_outage_that_a_program_sees_is_in_its_list(live: Live) -> None:
    program = fly(live, "writer_c", ("gap_ms=1",), ROUTE)
    lines = (program.running.dir / "gaps").read_text().splitlines()
    gaps_ns = sorted(int(end) - int(begin) for begin, end in map(str.split, lines))
    # The nodes share a clock. What was frozen cannot have ticked.
    frozen_ms = sorted(float(report["freeze_ms"]) for report in program.reports)
    assert len(gaps_ns) >= len(frozen_ms)
    for seen_ns, told_ms in zip(gaps_ns[-len(frozen_ms) :], frozen_ms, strict=True):
        assert seen_ns >= told_ms * 1e6 * 0.9, f"{seen_ns} ns seen, {told_ms} ms told"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_changes_all_the_time_acquits_after_ten_times(live: Live, name: str) -> None:
    fly(live, name, PROGRAMS[name], ROUTE * 10)


@pytest.mark.slow
def test_a_quarter_of_a_gibibyte_of_changing_mappings_acquits(live: Live) -> None:
    fly(live, "mapper_c", ("mib=256", "rate=0"), ROUTE * 3)
