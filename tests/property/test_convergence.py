"""What no program, line or budget can make `decide` do; and what it does with simulated ones."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from godwit.migrate import convergence
from godwit.migrate.convergence import (
    MAX_ROUNDS,
    Decision,
    Limits,
    Round,
    Step,
    Strategy,
    decide,
    eta_s,
    fixed_freeze_s,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "decisions" / "0009-when-to-freeze.md"
FIXED_S = fixed_freeze_s(1, 4, 10, 40)
MIB = 256  # in pages
AUTO, PRECOPY = Strategy.AUTO, Strategy.PRECOPY
FREEZE, HYBRID, GIVE_UP = Step.FREEZE, Step.HYBRID, Step.GIVE_UP


def limits_of(max_freeze_s: float | None) -> Limits:
    return Limits(max_freeze_s=max_freeze_s, fixed_freeze_s=FIXED_S, seconds_left=None, postcopy=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A model of what writes: sets of pages, each written at random at a rate, and bursts."""

    pages: int
    sets: tuple[tuple[int, float], ...] = ()  # pages, page writes per second
    burst_pages: int = 0
    burst_every_s: float = math.inf
    packs: float = 1.0  # part of its size that the first round has on the wire

    def dirty(self, start_s: float, seconds: float) -> int:
        """Return how many distinct pages are written in this time."""
        steady = sum(size * -math.expm1(-rate * seconds / size) for size, rate in self.sets)
        bursts = int((start_s + seconds) / self.burst_every_s) > int(start_s / self.burst_every_s)
        return min(round(steady) + self.burst_pages * bursts, self.pages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a simulated move ended."""

    decision: Decision
    rounds: tuple[Round, ...]
    freeze_s: float  # as it would have been
    total_s: float


def simulate(
    program: Program,
    line_mib_s: float,
    strategy: Strategy,
    limit: Limits,
    *,
    noise: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """Move a program by what `decide` says. Noise is the part by which each time may be off."""
    dice = random.Random(seed)
    rounds: list[Round] = []
    pages, clock_s, scanned_s, page_s = program.pages, 0.0, 0.0, 1 / (line_mib_s * MIB)
    while True:
        left_s = None if limit.seconds_left is None else limit.seconds_left - clock_s
        decision = decide(strategy, rounds, dataclasses.replace(limit, seconds_left=left_s))
        if decision.step is not Step.ROUND:
            break
        packs = 1.0 if rounds else program.packs
        seconds = 0.5e-3 + pages * packs * page_s * (1 + dice.uniform(0, noise))
        found = program.dirty(clock_s, seconds)
        scan_s = 0.9e-3 * program.pages / (1024 * MIB) + 0.14e-6 * found
        rounds.append(
            Round(
                pages=pages,
                bytes=int(pages * packs * 4096),
                seconds=seconds,
                dirty_pages=found,
                scan_s=scan_s,
            )
        )
        scanned_s, clock_s, pages = clock_s, clock_s + seconds + scan_s, found
    # Written since the last scan but one: what that one found, and what came until all threads stood still.
    rest = program.dirty(scanned_s, clock_s + convergence.STOP_S - scanned_s) if rounds else program.pages
    freeze_s = limit.fixed_freeze_s + (rounds[-1].scan_s if rounds else 0.0) + rest * page_s
    if decision.step is HYBRID:
        freeze_s = decision.expected_freeze_s  # nothing but the constants to compare it with
    return Outcome(decision=decision, rounds=tuple(rounds), freeze_s=freeze_s, total_s=clock_s + freeze_s)


GIB = 1024 * MIB
FAST, SLOW = 600.0, 12.0  # MiB/s: TCP between two nodes of the lab; 100 Mbit/s
CASES: dict[str, tuple[Program, float]] = {
    "1 GiB, writes nothing": (Program(pages=GIB), FAST),
    "1 GiB, 64 MiB/s at random": (Program(pages=GIB, sets=((GIB, 64 * MIB),)), FAST),
    "1 GiB, 300 MiB/s at random": (Program(pages=GIB, sets=((GIB, 300 * MIB),)), FAST),
    "1 GiB, 500 MiB/s at random": (Program(pages=GIB, sets=((GIB, 500 * MIB),)), FAST),
    "1 GiB, 32 MiB of it as fast as it can": (Program(pages=GIB, sets=((32 * MIB, 1e9),)), FAST),
    "1 GiB, 2 MiB of it as fast as it can": (Program(pages=GIB, sets=((2 * MIB, 1e9),)), FAST),
    "1 GiB, 4 MiB/s, and 96 MiB every 2 s": (
        Program(pages=GIB, sets=((GIB, 4 * MIB),), burst_pages=96 * MIB, burst_every_s=2.0),
        FAST,
    ),
    "16 GiB, 40 MiB/s over 2 GiB": (Program(pages=16 * GIB, sets=((2 * GIB, 40 * MIB),)), FAST),
    "1 GiB, 1 MiB/s at random, 12 MiB/s": (Program(pages=GIB, sets=((GIB, MIB),)), SLOW),
    "1 GiB, 64 MiB/s at random, 12 MiB/s": (Program(pages=GIB, sets=((GIB, 64 * MIB),)), SLOW),
}
COLUMNS = ((AUTO, None), (AUTO, 0.02), (AUTO, 0.2), (PRECOPY, None), (PRECOPY, 0.02))


@functools.cache
def outcome(name: str, strategy: Strategy, budget_s: float | None) -> Outcome:
    program, line = CASES[name]
    return simulate(program, line, strategy, limits_of(budget_s))


def cell(result: Outcome) -> str:
    word = {FREEZE: "freeze", HYBRID: "hybrid", GIVE_UP: "undone"}[result.decision.step]
    time = f"{result.freeze_s * 1e3:.3g} ms" if result.freeze_s < 1 else f"{result.freeze_s:.3g} s"
    return f"{len(result.rounds)}: {word}" + ("" if result.decision.step is GIVE_UP else f" {time}")


def table() -> Iterator[str]:
    for name in CASES:
        yield f"| {name} | " + " | ".join(cell(outcome(name, *column)) for column in COLUMNS) + " |"


def test_the_page_shows_what_the_simulation_gives() -> None:
    page = PAGE.read_text().splitlines()
    assert [row for row in table() if row not in page] == []


@pytest.mark.parametrize("name", CASES)
def test_the_freeze_is_as_long_as_expected(name: str) -> None:
    for strategy, budget_s in COLUMNS:
        result = outcome(name, strategy, budget_s)
        if result.decision.step is not HYBRID:
            # A little too long does no harm: what a short round takes besides its pages counts as theirs.
            assert 0.9 * result.freeze_s <= result.decision.expected_freeze_s <= 1.15 * result.freeze_s


@pytest.mark.parametrize("number", range(1, 4))
def test_a_burst_in_any_one_round_never_undoes_a_move(number: int) -> None:
    calm = Program(pages=GIB // 4, sets=((GIB // 4, 30 * MIB),))
    rounds = simulate(calm, 100.0, PRECOPY, limits_of(0.02)).rounds
    middle_s = sum(each.seconds + each.scan_s for each in rounds[:number]) + rounds[number].seconds / 2
    program = dataclasses.replace(calm, burst_pages=128 * MIB, burst_every_s=middle_s)
    result = simulate(program, 100.0, PRECOPY, limits_of(0.02))
    assert result.rounds[number].dirty_pages > result.rounds[number].pages
    assert result.decision.step is FREEZE, result.decision.why
    assert result.freeze_s < 0.02


times = st.floats(min_value=0, max_value=30, allow_nan=False)
counts = st.integers(min_value=0, max_value=1000) | st.integers(min_value=0, max_value=1 << 22)
short = st.floats(min_value=1e-3, max_value=0.1)
budgets = st.none() | short | st.floats(min_value=1e-3, max_value=10)
strategies = st.sampled_from(Strategy)
any_round = st.builds(
    Round,
    pages=counts,
    bytes=st.integers(min_value=0, max_value=1 << 34),
    seconds=times,
    dirty_pages=counts,
    scan_s=st.floats(min_value=0, max_value=0.3),
)
any_rounds = st.lists(any_round, max_size=MAX_ROUNDS + 5)
any_limits = st.builds(
    Limits,
    max_freeze_s=budgets,
    fixed_freeze_s=short,
    seconds_left=st.none() | st.floats(min_value=-1, max_value=100),
    postcopy=st.booleans(),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    pages = draw(st.integers(min_value=1, max_value=1 << 22))
    sizes = st.integers(min_value=1, max_value=pages)
    return Program(
        pages=pages,
        sets=tuple(draw(st.lists(st.tuples(sizes, st.floats(min_value=0, max_value=1e7)), max_size=3))),
        burst_pages=draw(sizes),
        burst_every_s=draw(st.floats(min_value=0.05, max_value=60)),
        packs=draw(st.floats(min_value=0, max_value=1)),
    )


@given(
    program=programs(),
    line_mib_s=st.floats(min_value=1, max_value=10_000),
    strategy=strategies,
    limits=any_limits,
    noise=st.floats(min_value=0, max_value=3),
    seed=st.integers(),
)
@example(
    program=Program(pages=GIB, sets=((GIB, 530 * MIB),)),
    line_mib_s=FAST,
    strategy=PRECOPY,
    limits=limits_of(0.02),
    noise=0,
    seed=0,
)
def test_every_program_stops_being_copied(
    program: Program, line_mib_s: float, strategy: Strategy, limits: Limits, noise: float, seed: int
) -> None:
    result = simulate(program, line_mib_s, strategy, limits, noise=noise, seed=seed)
    assert len(result.rounds) <= MAX_ROUNDS
    memory_bytes = max(program.pages * 4096, (64 << 20) / 3)
    assert sum(each.bytes for each in result.rounds) <= 3 * memory_bytes


@given(
    rounds=st.lists(any_round, min_size=MAX_ROUNDS, max_size=MAX_ROUNDS),
    strategy=strategies,
    limits=any_limits,
)
def test_there_is_no_round_after_the_last(rounds: list[Round], strategy: Strategy, limits: Limits) -> None:
    assert decide(strategy, rounds, limits).step is not Step.ROUND


@given(rounds=any_rounds, strategy=strategies, limits=any_limits)
def test_a_named_budget_is_kept_except_by_stop_and_copy(
    rounds: list[Round], strategy: Strategy, limits: Limits
) -> None:
    decision = decide(strategy, rounds, limits)
    stops = decision.step in {Step.FREEZE, Step.HYBRID} and strategy is not Strategy.STOPCOPY
    if stops and limits.max_freeze_s is not None:
        assert decision.expected_freeze_s <= limits.max_freeze_s


@given(rounds=any_rounds, strategy=strategies, limits=any_limits)
def test_a_larger_budget_never_undoes_what_a_smaller_one_froze(
    rounds: list[Round], strategy: Strategy, limits: Limits
) -> None:
    ladder = [*(2**step / 1e3 for step in range(14)), None]
    steps = [
        decide(strategy, rounds, dataclasses.replace(limits, max_freeze_s=budget_s)).step
        for budget_s in ladder
    ]
    first = steps.index(FREEZE) if FREEZE in steps else len(steps)
    assert GIVE_UP not in steps[first:]


@given(rounds=any_rounds, strategy=strategies, limits=any_limits)
def test_nothing_stays_behind_where_it_could_not_be_served(
    rounds: list[Round], strategy: Strategy, limits: Limits
) -> None:
    step = decide(strategy, rounds, dataclasses.replace(limits, postcopy=False)).step
    assert step is not Step.HYBRID
    if strategy in {Strategy.PRECOPY, Strategy.STOPCOPY}:
        assert decide(strategy, rounds, limits).step is not Step.HYBRID


@given(rounds=any_rounds, strategy=strategies, limits=any_limits)
def test_a_freeze_is_never_expected_below_its_fixed_part(
    rounds: list[Round], strategy: Strategy, limits: Limits
) -> None:
    decision = decide(strategy, rounds, limits)
    assert decision.expected_freeze_s >= limits.fixed_freeze_s
    assert decision.pages >= 0
    assert decision.why


@given(rounds=any_rounds, strategy=strategies, limits=any_limits)
def test_a_move_with_time_and_without_a_budget_is_never_undone(
    rounds: list[Round], strategy: Strategy, limits: Limits
) -> None:
    free = dataclasses.replace(limits, max_freeze_s=None, seconds_left=None, postcopy=True)
    assert decide(strategy, rounds, free).step is not Step.GIVE_UP


@given(rounds=any_rounds, remaining=counts)
def test_the_remaining_time_is_a_time(rounds: list[Round], remaining: int) -> None:
    left_s = eta_s(rounds, remaining)
    assert left_s is None or left_s >= 0
