"""Whatever dies in the middle of a move: one copy runs, and the error names it truthfully.

Here memory goes over in the freeze; `test_disasters` has rounds before it and pages that follow.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from godwit.migrate.faults import DESTINATION_STEPS, SOURCE_STEPS
from tests.conftest import requires
from tests.kernel import counting as tools
from tests.kernel import disasters
from tests.kernel.counting import Counting, Machine, Outcome, Pair, Server

pytestmark = [requires("root", "command:cc")]

RANDOM_KILLS = 30
STRATEGIES = ["stopcopy", "precopy", "hybrid", "postcopy"]
SOURCE = [step for step in SOURCE_STEPS if step not in disasters.NEVER["stopcopy"]]
DESTINATION = [step for step in DESTINATION_STEPS if step not in disasters.NEVER["stopcopy"]]


@pytest.fixture(autouse=True)
def strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GODWIT_TEST_STRATEGY", "stopcopy")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.compiled(tmp_path_factory.mktemp("counter"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.make(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(authority: Pair, tmp_path: Path) -> Pair:
    """Two machines without a past."""
    machines = []
    for known in (authority.source, authority.destination):
        directory = tmp_path / known.directory.name
        directory.mkdir()
        (directory / "certs").symlink_to(known.directory / "certs")
        machines.append(Machine(directory))
    return Pair(*machines)


@pytest.fixture
def counter(program: Path, tmp_path: Path) -> Iterator[Counting]:
    with tools.counting(program, tmp_path) as found:
        yield found


@dataclass(frozen=True)
class Before:
    """What there was before a move."""

    pods: frozenset[int]


@pytest.fixture
def before() -> Before:
    return Before(frozenset(tools.pods()))


def where(counter: Counting, pid: int) -> str:
    return "source" if pid == counter.pid else "destination"


def expect_one(counter: Counting, pair: Pair, server: Server, before: Before, survivor: str) -> None:
    """See that exactly one copy runs, that it is the one named, and that nothing else is left."""
    server.wait_until_idle()
    pid = counter.only_copy()
    assert where(counter, pid) == survivor

    def stray_pods() -> dict[int, list[int]]:
        return {
            init: children
            for init, children in tools.pods().items()
            if init not in before.pods and pid not in children
        }

    tools.until(lambda: not stray_pods(), f"no pod is left but the program's: {stray_pods()}", 5)
    allowed = {pid, server.process.pid}
    tools.until(
        lambda: all(pid in children for init, children in tools.pods().items() if init not in before.pods),
        "the pod holds the program",
        5,
    )
    pods = set(tools.pods())

    def strays() -> dict[int, str]:
        return tools.session_strays(allowed | pods)

    tools.until(lambda: not strays(), f"nothing is left: {strays()}", 5)
    assert pair.source.undecided() == []
    assert pair.source.records() == []
    assert pair.destination.undecided() == []


def test_an_undisturbed_move_leaves_one_copy(counter: Counting, pair: Pair, before: Before) -> None:
    with tools.serving(pair.destination) as server:
        outcome = tools.move(counter.pid, server.host, pair.source)
        assert outcome.error is None
        assert outcome.survivor == "destination"
        expect_one(counter, pair, server, before, "destination")


def expected_of_dead_source(step: str) -> set[str]:
    """GO on the wire may lose against the question what became of it: then the source has it."""
    if step == "killed":
        return {"destination"}
    return {"source", "destination"} if step == "gone" else {"source"}


@pytest.mark.parametrize("step", SOURCE)
def test_a_source_killed_at_any_step_leaves_one_copy(
    step: str, counter: Counting, pair: Pair, before: Before
) -> None:
    with tools.serving(pair.destination) as server:
        outcome = tools.move(counter.pid, server.host, pair.source, GODWIT_FAULT=f"source:{step}")
        assert outcome.error is not None
        assert outcome.error["class"] == "MigrationError"
        assert outcome.status == 9
        assert outcome.survivor in expected_of_dead_source(step), outcome.error["line"]
        expect_one(counter, pair, server, before, outcome.survivor)


@pytest.mark.parametrize("step", DESTINATION)
def test_a_destination_killed_at_any_step_leaves_one_copy(
    step: str, counter: Counting, pair: Pair, before: Before
) -> None:
    with tools.serving(pair.destination, GODWIT_FAULT=f"destination:{step}") as server:
        outcome = tools.move(counter.pid, server.host, pair.source)
        wanted = "destination" if step in ("released", "told") else "source"
        assert outcome.survivor == wanted, outcome
        if step == "told":
            assert outcome.error is None
        else:
            assert outcome.error is not None
            assert outcome.error["class"] == "MigrationError"
        expect_one(counter, pair, server, before, wanted)


@pytest.mark.parametrize("step", SOURCE)
def test_the_whole_group_of_the_source_killed_is_settled_by_recover(
    step: str, counter: Counting, pair: Pair, before: Before
) -> None:
    with tools.serving(pair.destination) as server:
        outcome = tools.move(counter.pid, server.host, pair.source, "group", step)
        assert outcome.status == -signal.SIGKILL
        server.wait_until_idle()
        pair.source.recover()
        survivor = where(counter, counter.only_copy())
        assert survivor in expected_of_dead_source(step)
        expect_one(counter, pair, server, before, survivor)


CUTS = [
    (frame, when)
    for frame in ("HEADER", "OUTLINE", "TREE", "FILES", "PAGES", "GO")
    for when in ("before", "after")
]


@pytest.mark.parametrize(("frame", "when"), CUTS)
def test_a_line_cut_at_any_frame_leaves_one_copy(
    frame: str, when: str, counter: Counting, pair: Pair, before: Before
) -> None:
    with tools.serving(pair.destination) as server:
        outcome = tools.move(counter.pid, server.host, pair.source, "cut", frame, when)
        assert outcome.error is not None
        assert outcome.error["class"] == "MigrationError"
        if (frame, when) != ("GO", "after"):
            assert outcome.survivor == "source", outcome.error["line"]
        assert outcome.survivor in ("source", "destination")
        expect_one(counter, pair, server, before, outcome.survivor)


@pytest.mark.parametrize("recovering_first", ["source", "destination"])
@pytest.mark.parametrize(("frame", "when"), [*CUTS[4:], ("END", "before"), ("END", "after")])
def test_both_ends_killed_at_once_are_settled_by_recover(
    frame: str, when: str, recovering_first: str, counter: Counting, pair: Pair, before: Before
) -> None:
    with tools.serving(pair.destination) as server:
        outcome = tools.move(
            counter.pid, server.host, pair.source, "crash", frame, when, str(server.process.pid)
        )
        assert outcome.status == -signal.SIGKILL
        server.wait_until_idle()
        assert len([pid for pid in counter.copies() if tools.state_of(pid) in "RSD"]) <= 1
        ends = [pair.source, pair.destination]
        for end in ends if recovering_first == "source" else ends[::-1]:
            end.recover()
        copies = counter.copies()
        expect_one(
            counter, pair, server, before, where(counter, copies[0]) if len(copies) == 1 else "one end"
        )


def test_a_destination_that_stays_away_after_go_leaves_it_undecided_until_it_is_back(
    counter: Counting, pair: Pair, before: Before
) -> None:
    """Nothing of the destination answers: the copy here stays stopped, and `recover` says so."""
    with tools.serving(pair.destination) as server:
        address = server.address
        outcome = tools.move(
            counter.pid, server.host, pair.source, "crash", "GO", "before", str(server.process.pid)
        )
        assert outcome.status == -signal.SIGKILL
        server.wait_until_idle()
    found = pair.source.recover()
    assert [each["role"] for each in found] == ["source"]
    assert found[0]["outcome"].startswith("still undecided"), (found, address)
    assert tools.state_of(counter.pid) == "T"
    # At home in the other machine what was built is ended too: nobody can say GO any more.
    assert [each["role"] for each in pair.destination.recover()] == ["destination"]
    tools.until(lambda: counter.copies() == [counter.pid], "the copy there is gone")
    tools.until(lambda: set(tools.pods()) <= before.pods, "its pod is gone")


def random_times() -> list[float]:
    chance = random.Random(20240)  # seeded: the same each time
    return [chance.uniform(0.0, 0.9) for _ in range(RANDOM_KILLS)]


def _kill_at(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.mark.parametrize(("number", "seconds"), list(enumerate(random_times())))
def test_the_command_killed_at_a_random_time_leaves_one_copy(
    number: int, seconds: float, counter: Counting, pair: Pair, before: Before
) -> None:
    """Only the command dies: its mover gives up before the commit, or goes on to the end."""
    token = f"GODWIT_TEST_MOVER={os.urandom(8).hex()}"
    name, _, value = token.partition("=")
    extra = {name: value, "GODWIT_TEST_STRATEGY": STRATEGIES[number % len(STRATEGIES)]}
    with tools.serving(pair.destination) as server:
        process = tools.start_move(counter.pid, server.host, pair.source, **extra)
        with process:
            _kill_at(process, seconds)
            tools.until(lambda: not tools.carrying(token, "environ"), "the mover ends")
        server.wait_until_idle()
        copies = counter.copies()
        assert len(copies) == 1
        expect_one(counter, pair, server, before, where(counter, copies[0]))


@pytest.mark.parametrize("step", ["ready", "sent"])
def test_no_record_stays_of_a_move_that_was_given_up(counter: Counting, pair: Pair, step: str) -> None:
    with tools.serving(pair.destination) as server:
        outcome: Outcome = tools.move(counter.pid, server.host, pair.source, GODWIT_FAULT=f"source:{step}")
        assert outcome.survivor == "source"
        server.wait_until_idle()
        assert pair.destination.records() == []
