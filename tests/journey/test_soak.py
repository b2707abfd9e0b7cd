"""Moves without end, back and forth, by strategies at random: what goes wrong once in a thousand times.

`GODWIT_SOAK_MOVES`, `GODWIT_SOAK_REDIS_MOVES` and `GODWIT_SOAK_SEED` make a run shorter, longer or the same;
`GODWIT_SOAK_PROGRAM` names the only one to be moved.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.errors import BusyError
from godwit.lab.cluster import Lab
from tests.conftest import requires
from tests.journey.live import STRATEGIES, Live, undone
from tests.journey.transfer import Program
from tests.workloads.driver import WORKLOADS

pytestmark = [requires("root"), pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

MOVES = int(os.environ.get("GODWIT_SOAK_MOVES", "1000"))
REDIS_MOVES = int(os.environ.get("GODWIT_SOAK_REDIS_MOVES", "200"))
SEED = int(os.environ.get("GODWIT_SOAK_SEED") or secrets.randbits(32))
MOVES_OF_ONE = 20  # then comes the next program
BUDGET_MS = (4.0, 40.0)  # less is refused before the first round
# Each with more to do than it can, and then at its ease: a freeze must fall on either.
PROGRAMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("mapper_c", ("rate=0",)),
    ("writer_c", ("rate=2000",)),
    ("forker_c", ("children=8", "life_ms=50")),
    ("spaces_c", ("rate=0", "sparse_gib=4")),
    ("threader_c", ("threads=24", "life_us=100000")),
    ("truncator_c", ("rate=0",)),
    ("kernelio_c", ()),
    ("writer_c", ("rate=20", "thp=1")),
    ("mapper_c", ()),
    ("writer_c", ("rate=200", "shared=1")),
    ("threads_c", ()),
    ("memory_c", ()),
)
ONLY = os.environ.get("GODWIT_SOAK_PROGRAM")


@pytest.fixture
def live(lab: Lab, shared: Path) -> Iterator[Live]:
    """Moves in the laboratory, with words of the test's choice."""
    transfer = Live(shared, lab)
    yield transfer
    transfer.close()


def say(line: str) -> None:
    sys.stdout.write(f"\n{line}\n")


class Soak:
    """Moves programs by strategies at random, and says which it was should one fail."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.dice = random.Random(SEED)
        self.strategies: list[str] = []
        say(f"GODWIT_SOAK_SEED={SEED}")

    def move(self, program: Program, *words: str) -> None:
        strategy = self.dice.choice(sorted(STRATEGIES))
        self.strategies.append(strategy)
        self.live.words = (*STRATEGIES[strategy], *words)
        destination = "a" if program.node == "b" else "b"
        with context(lambda: f"move {len(self.strategies)}, {program.moves + 1} of {self.what(program)}"):
            self.live.move(program, destination)

    def try_to_move(self, program: Program) -> None:
        """Begin a move; it may be undone."""
        strategy = self.dice.choice(sorted(STRATEGIES))
        destination = "a" if program.node == "b" else "b"
        budget = f"{self.dice.uniform(*BUDGET_MS):.1f}ms"
        with context(lambda: f"a try by {strategy} within {budget} with {self.what(program)}"):
            done = self.live.attempt(program, destination, *STRATEGIES[strategy], "--max-freeze", budget)
            if done.returncode == 0:
                self.strategies.append(strategy)
                self.live.came(program, destination, json.loads(done.stdout)["pid"])
            elif done.returncode != BusyError.exit_status:
                undone(done)
                self.live.expect_undone(program, destination)

    def finish(self, program: Program) -> None:
        with context(lambda: f"the verdict after {len(self.strategies)} moves of {self.what(program)}"):
            self.live.finish(program)

    def what(self, program: Program) -> str:
        """Name a program and how it was moved lately, oldest first."""
        lately = self.strategies[-min(program.moves + 1, 6) :]
        verdict = program.running.result()
        said = f"; it says {verdict.text!r}" if verdict else ""
        return f"{program.running.workload.name} by {', '.join(lately)}; GODWIT_SOAK_SEED={SEED}{said}"

    def summary(self) -> str:
        counts = {name: self.strategies.count(name) for name in STRATEGIES}
        return f"{len(self.strategies)} moves: {counts}"


@contextlib.contextmanager
def context(note: Callable[[], str]) -> Iterator[None]:
    """Add a note, made then, to whatever is raised in the block."""
    try:
        yield
    except Exception as error:
        error.add_note(note())
        raise


def test_programs_that_are_moved_a_thousand_times_acquit(live: Live) -> None:
    soak = Soak(live)
    programs = 0
    chosen = [each for each in PROGRAMS if ONLY in (None, each[0])]
    while len(soak.strategies) < MOVES:
        name, options = chosen[programs % len(chosen)]
        programs += 1
        program = live.start(name, options)
        for _ in range(min(MOVES_OF_ONE, MOVES - len(soak.strategies))):
            soak.move(program)
        soak.finish(program)
    say(soak.summary())


def test_programs_whose_moves_are_cut_short_a_thousand_times_acquit(live: Live) -> None:
    """Most of these freezes last too long for their budget and are undone, each at another step."""
    soak = Soak(live)
    programs = tries = 0
    chosen = [each for each in PROGRAMS if ONLY in (None, each[0])]
    while tries < MOVES:
        name, options = chosen[programs % len(chosen)]
        programs += 1
        program = live.start(name, options)
        for _ in range(min(MOVES_OF_ONE, MOVES - tries)):
            tries += 1
            soak.try_to_move(program)
        soak.finish(program)
    say(f"{tries} tries, {soak.summary()}")


def test_a_server_under_a_writing_client_is_moved_two_hundred_times_and_loses_nothing(live: Live) -> None:
    reason = WORKLOADS["redis_py"].available()
    if reason is not None:
        pytest.skip(reason)
    soak = Soak(live)
    program = live.start("redis_py")
    for _ in range(REDIS_MOVES):
        # What connects them is TCP, which breaks; the client goes on from where the server is.
        soak.move(program, "--tcp-close")
    soak.finish(program)
    verdict = program.running.result()
    assert verdict is not None
    say(f"{soak.summary()}; {verdict.text}")
