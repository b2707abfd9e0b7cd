"""When to stop copying and freeze: arithmetic over the rounds so far.

Values in, values out: no clock, no socket, no process. The reasons and a table of outcomes stand in
`docs/decisions/0009-when-to-freeze.md`. Rounds and the writable working set are from Clark et al., "Live
Migration of Virtual Machines", NSDI 2005.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from godwit.types import PAGE_SIZE

# What a freeze costs without pages, measured: docs/benchmarks.md, "What one more costs".
_FREEZE_BASE_S: Final = 5e-3
_FREEZE_MAPPING_S: Final = 7e-6
_FREEZE_DESCRIPTOR_S: Final = 88e-6
_FREEZE_THREAD_S: Final = 455e-6
_FREEZE_PROCESS_S: Final = 2.7e-3

# No round is shorter: a scan, a wake-up at either end and the answer. Rates over less are noise.
LATENCY_S: Final = 1e-3
# Between the last scan and the last thread stopped the program goes on writing; 0.2 to 0.7 ms measured.
STOP_S: Final = 1e-3
# Pages to measure a line by: 8 MiB, 13 ms at 600 MiB/s, so that LATENCY_S is less than a tenth of it.
SAMPLE_PAGES: Final = 2048
# Memory that packs well is mostly empty, and what the program writes is not: the first round is no measure of
# how that packs, and we expect the worst, down to this part of its speed.
DENSEST: Final = 1 / 8

# A round must leave at most this part of what it sends. Above it, 1 / (1 - 0.75) = 4 times what is left would
# be sent before it were gone, and the program pays 1 to 2 us for each page it writes meanwhile.
PAYS_BEFORE_HYBRID: Final = 0.75
# Where the only other way is a long freeze or none, slower progress is worth having.
PAYS_ALONE: Final = 0.9
# ... and once the freeze would fit, a round must also spare this much of it: few pages are a quick round.
WORTH_S: Final = 2e-3
# One bad round may be a burst. So may one long one be, but not its average.
IDLE_ROUNDS: Final = 2
IDLE_SECONDS: Final = 5.0
# Undoing the move is the dearest end, so it waits for a lull longest.
IDLE_ROUNDS_BEFORE_UNDO: Final = 5
# Without a budget the best moment among bad ones: not more above the smallest rest seen.
GOOD_MOMENT: Final = 1.25
# What memory may add to a freeze that nobody limited. People hardly notice a tenth of a second, TCP sends
# again after two; and a program on two machines until it is drained dies with either.
TOLERATED_S: Final = 0.1
# ... and where memory can follow on demand, which costs a freeze hardly anything.
TOLERATED_BEFORE_HYBRID_S: Final = 0.01

MAX_ROUNDS: Final = 30  # Clark et al. use 30 as well: a working set shows itself long before
MAX_VOLUME: Final = 3  # times the memory: a line shared with others is not ours for ever
MIN_VOLUME_BYTES: Final = 64 << 20  # small programs are limited by MAX_ROUNDS: this is nothing to a line

# Post-copy's own part of a freeze: noting and registering what is to follow; 1 to 3 ms measured.
HYBRID_S: Final = 3e-3
# What is written all over is given up before the freeze. What is left of older versions must be dropped
# within: an injected call for each run, and its pages freed.
HYBRID_RUN_S: Final = 1e-6
HYBRID_PAGE_S: Final = 0.03e-6
# As many of the hottest pages as fit into this go along, each saving a fault of 35 to 60 us.
HOT_S: Final = 2e-3
# From the moment when time is up until the program runs again: the mover looks every quarter of a second.
UNDO_S: Final = 0.25


class Strategy(enum.StrEnum):
    """How memory is moved."""

    AUTO = "auto"
    STOPCOPY = "stopcopy"
    PRECOPY = "precopy"
    POSTCOPY = "postcopy"
    HYBRID = "hybrid"


class Step(enum.Enum):
    """What to do next."""

    ROUND = enum.auto()  # copy once more what is dirty now
    FREEZE = enum.auto()  # stop and send the rest
    HYBRID = enum.auto()  # stop, send tables and the hot rest; the remainder comes on demand
    GIVE_UP = enum.auto()  # undo the move: the budget cannot be kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What a finished round was like."""

    pages: int  # sent in it
    bytes: int  # that left for the wire, after packing
    seconds: float  # from its scan to its last byte accepted
    dirty_pages: int  # distinct, found written when the next scan was taken
    scan_s: float  # what that scan took


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a move has to keep to."""

    max_freeze_s: float | None  # the user's budget; None: TOLERATED_S on top of the next
    fixed_freeze_s: float  # see `fixed_freeze_s`
    seconds_left: float | None  # until --timeout
    postcopy: bool  # both ends can serve missing pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do next, and why."""

    step: Step
    expected_freeze_s: float  # of this step; for ROUND and GIVE_UP: of a freeze now
    pages: int  # to send within that freeze; HYBRID: so many of the hottest
    why: str  # for the user


def fixed_freeze_s(processes: int, threads: int, descriptors: int, mappings: int) -> float:
    """Estimate what a freeze of a tree costs without any page.

    Args:
        processes: In the tree, the root included.
        threads: In all of them, the first of each included.
        descriptors: Open, in all of them.
        mappings: Lines of maps, in all of them.
    """
    return (
        _FREEZE_BASE_S
        + _FREEZE_PROCESS_S * max(processes - 1, 0)
        + _FREEZE_THREAD_S * max(threads - processes, 0)
        + _FREEZE_DESCRIPTOR_S * descriptors
        + _FREEZE_MAPPING_S * mappings
    )


def decide(strategy: Strategy, rounds: Sequence[Round], limits: Limits) -> Decision:
    """Say what to do after these rounds. Never ROUND after MAX_ROUNDS of them.

    Args:
        strategy: As asked for. HYBRID without `limits.postcopy` is PRECOPY.
        rounds: Oldest first; the first one sent everything.
        limits: As they are now.
    """
    case = _Case(strategy, rounds, limits)
    if not case.in_time(limits.fixed_freeze_s):
        return case.give_up(f"only {_time(max(limits.seconds_left or 0.0, 0.0))} are left")
    if strategy is Strategy.STOPCOPY:
        return case.freeze("as asked, all is sent while the program stands still")
    if limits.fixed_freeze_s > case.budget_s:
        return case.give_up(f"a freeze without memory would take {_time(limits.fixed_freeze_s)}")
    if strategy is Strategy.POSTCOPY:
        return case.hybrid("as asked") if case.hybrid_fits else case.give_up(case.no_hybrid)
    if not rounds:
        return case.once_more("the first round sends everything")
    return _after_rounds(case)


def eta_s(rounds: Sequence[Round], remaining_pages: int) -> float | None:
    """Estimate the seconds until all is sent: what remains, and what is written meanwhile.

    Args:
        rounds: As for `decide`; the one under way may be last, with no dirty pages.
        remaining_pages: Of the round under way.

    Returns:
        None as long as nothing was sent.
    """
    if not any(round_.pages for round_ in rounds):
        return None
    page_s = seconds_per_page(rounds)
    finished = [round_ for round_ in rounds if round_.dirty_pages]
    written = _written_per_s(finished[-1]) if finished else 0.0
    # The series 1 + r + r^2 + ...; above PAYS_BEFORE_HYBRID rounds end for another reason.
    return remaining_pages * page_s / (1 - min(written * page_s, PAYS_BEFORE_HYBRID))


def seconds_per_page(rounds: Sequence[Round]) -> float:
    """Return what a page cost lately, over at least SAMPLE_PAGES if there were so many; else 0."""
    pages, seconds = 0.0, 0.0
    for number in reversed(range(len(rounds))):
        round_ = rounds[number]
        pages += round_.pages if number else _dense_pages(round_)
        seconds += round_.seconds
        if pages >= SAMPLE_PAGES:
            break
    return max(seconds, LATENCY_S) / pages if pages else 0.0


def _dense_pages(first: Round) -> float:
    """Return how many pages the round would have sent in its time, had they packed badly."""
    return max(min(first.bytes / PAGE_SIZE, first.pages), first.pages * DENSEST)


def _written_per_s(round_: Round) -> float:
    return round_.dirty_pages / max(round_.seconds, LATENCY_S)


def _next_round_s(rounds: Sequence[Round]) -> float:
    """Return how long another round would take: its pages, and what the last one took besides pages."""
    last, page_s = rounds[-1], seconds_per_page(rounds)
    return last.dirty_pages * page_s + max(last.seconds - last.pages * page_s, LATENCY_S)


def _left_by_another(rounds: Sequence[Round]) -> float:
    """Return how many pages we expect to find dirty after one more round.

    In proportion to its time: a working set written over and over again gives more, and the round shows it.
    """
    return _written_per_s(rounds[-1]) * _next_round_s(rounds)


class _Case:
    """The numbers that a decision weighs, and the words for it."""

    def __init__(self, strategy: Strategy, rounds: Sequence[Round], limits: Limits) -> None:
        self.strategy = strategy
        self.rounds = rounds
        self.limits = limits
        self.budget_s = math.inf if limits.max_freeze_s is None else limits.max_freeze_s
        self.page_s = seconds_per_page(rounds)
        self.dirty = rounds[-1].dirty_pages if rounds else 0
        self.rest = self._rest()
        # The scan within a freeze finds little, so the cheaper of the last two is nearer to it.
        scan_s = min((round_.scan_s for round_ in rounds[-2:]), default=0.0)
        self.bare_s = limits.fixed_freeze_s + scan_s
        self.freeze_s = self.bare_s + self.rest * self.page_s
        self._weigh_hybrid()

    def _rest(self) -> int:
        """Return how many pages a freeze now would send: the dirty ones, and those written until it holds."""
        if not self.dirty:
            return 0
        last = self.rounds[-1]
        more = math.ceil(_written_per_s(last) * (last.scan_s + STOP_S))
        return min(self.dirty + more, max(self.rounds[0].pages, self.dirty))

    def _weigh_hybrid(self) -> None:
        clean = self.rounds[0].pages - self.rest if self.rounds else 0
        runs = min(self.rest, max(clean, 0) + 1)  # there are no more without a clean page between two
        bare_s = self.bare_s + HYBRID_S + runs * HYBRID_RUN_S + self.rest * HYBRID_PAGE_S
        spare_s = min(max(self.budget_s - bare_s, 0.0), HOT_S)
        self.hot = min(int(spare_s / self.page_s), self.rest) if self.page_s else self.rest
        # Rounding must not put the hot pages, cut to the budget, a hair above it.
        self.hybrid_s = max(bare_s, min(bare_s + self.hot * self.page_s, self.budget_s))
        self.hybrid_fits = self.willing and self.hybrid_s <= self.budget_s and self.in_time(self.hybrid_s)
        self.no_hybrid = (
            f"even with memory on demand a freeze would take {_time(self.hybrid_s)}"
            if self.limits.postcopy
            else "memory on demand is not possible between these machines"
        )

    @property
    def willing(self) -> bool:
        """Whether memory may follow on demand."""
        return self.strategy is not Strategy.PRECOPY and self.limits.postcopy

    def in_time(self, seconds: float) -> bool:
        """Tell whether so much fits into the time left, with an undo after it."""
        return self.limits.seconds_left is None or seconds + UNDO_S <= self.limits.seconds_left

    @property
    def fits(self) -> bool:
        """Whether a freeze now is short enough."""
        limit_s = self.budget_s
        if self.limits.max_freeze_s is None:
            tolerated_s = TOLERATED_BEFORE_HYBRID_S if self.willing else TOLERATED_S
            limit_s = self.limits.fixed_freeze_s + tolerated_s
        return self.freeze_s <= limit_s and self.in_time(self.freeze_s)

    def pays(self, count: int, part: float) -> bool:
        """Tell whether, after `count` rounds, another was to leave at most this part of what it sends."""
        dirty = self.rounds[count - 1].dirty_pages
        return dirty > 0 and _left_by_another(self.rounds[:count]) <= part * dirty

    @property
    def paying_part(self) -> float:
        """The part of what it sends that a round may leave and still pay."""
        return PAYS_BEFORE_HYBRID if self.willing else PAYS_ALONE

    @property
    def spares_s(self) -> float:
        """How much shorter a freeze would be after one more round."""
        return (self.dirty - _left_by_another(self.rounds)) * self.page_s

    def idle(self) -> tuple[int, float]:
        """Return how many rounds in a row, up to now, did not pay, and how long they took."""
        count, seconds = 0, 0.0
        for number in range(len(self.rounds), 0, -1):
            if self.pays(number, self.paying_part):
                break
            count, seconds = count + 1, seconds + self.rounds[number - 1].seconds
        return count, seconds

    def exhausted(self) -> str:
        """Say why there can be no further round; empty if there can."""
        next_bytes, sent = self.dirty * PAGE_SIZE, sum(round_.bytes for round_ in self.rounds)
        volume = max(MAX_VOLUME * self.rounds[0].pages * PAGE_SIZE, MIN_VOLUME_BYTES)
        next_s = _next_round_s(self.rounds) + self.rounds[-1].scan_s
        if len(self.rounds) >= MAX_ROUNDS:
            return f"{len(self.rounds)} rounds are enough"
        if sent + next_bytes > volume:
            return f"{_size(sent)} have been sent of {_size(self.rounds[0].pages * PAGE_SIZE)} of memory"
        if not self.in_time(next_s + self.freeze_s):
            return f"another round of {_time(next_s)} does not fit into the time left"
        return ""

    def rest_text(self) -> str:
        """Say what a freeze would send."""
        left = f"{_size(self.rest * PAGE_SIZE)} are left" if self.rest else "nothing is left to send"
        return f"{left}, a freeze takes about {_time(self.freeze_s)}"

    def losing_text(self) -> str:
        """Say why rounds do not help."""
        if self.bare_s > self.budget_s:
            return f"with its scan a freeze without memory would take {_time(self.bare_s)}"
        written = _size(int(_written_per_s(self.rounds[-1]) * PAGE_SIZE))
        rate = f", the line takes {_size(int(PAGE_SIZE / self.page_s))}/s" if self.page_s else ""
        return f"rounds no longer pay: {written}/s are written{rate}"

    def freeze(self, reason: str) -> Decision:
        """Answer FREEZE."""
        return self._now(Step.FREEZE, f"freezing: {reason}; {self.rest_text()}")

    def hybrid(self, reason: str) -> Decision:
        """Answer HYBRID."""
        behind = _size((self.rest - self.hot) * PAGE_SIZE)
        why = f"freezing for about {_time(self.hybrid_s)}, {behind} follow on demand: {reason}"
        return Decision(step=Step.HYBRID, expected_freeze_s=self.hybrid_s, pages=self.hot, why=why)

    def once_more(self, reason: str) -> Decision:
        """Answer ROUND."""
        return self._now(Step.ROUND, f"{'another round' if self.rounds else 'a round'}: {reason}")

    def give_up(self, reason: str) -> Decision:
        """Answer GIVE_UP."""
        budget = "" if math.isinf(self.budget_s) else f", {_time(self.budget_s)} are allowed"
        tail = f"; {self.rest_text()}" if self.rounds else ""
        return self._now(Step.GIVE_UP, f"giving up: {reason}{tail}{budget}")

    def _now(self, step: Step, why: str) -> Decision:
        return Decision(step=step, expected_freeze_s=self.freeze_s, pages=self.rest, why=why)


def _after_rounds(case: _Case) -> Decision:
    if case.strategy is Strategy.HYBRID and case.limits.postcopy:
        return _hybrid_asked(case)
    pays = case.pays(len(case.rounds), case.paying_part)
    if case.fits and not (pays and case.spares_s >= WORTH_S):
        return case.freeze("another round would hardly make it shorter")
    exhausted = case.exhausted()
    if exhausted:
        return _end(case, exhausted, last_chance=True)
    idle, idle_s = case.idle()
    if idle >= IDLE_ROUNDS_BEFORE_UNDO:
        return _end(case, case.losing_text(), last_chance=True)
    if idle >= IDLE_ROUNDS or (idle and idle_s >= IDLE_SECONDS and case.hybrid_fits):
        return _end(case, case.losing_text(), last_chance=False)
    after = f"about {_size(int(_left_by_another(case.rounds)) * PAGE_SIZE)} after it"
    return case.once_more(f"{case.rest_text()}; {after if pays else 'so much may have been a burst'}")


def _hybrid_asked(case: _Case) -> Decision:
    """Decide for a user who asked for hybrid: one full round, and a second if it halves what stays behind."""
    if case.fits and case.freeze_s <= case.hybrid_s:
        return case.freeze("there is too little left to leave it behind")
    exhausted = case.exhausted()
    if case.hybrid_fits:
        ready = len(case.rounds) >= 2 or not case.pays(1, 0.5) or exhausted
        return case.hybrid("as asked") if ready else case.once_more(case.rest_text())
    if exhausted or case.idle()[0] >= IDLE_ROUNDS_BEFORE_UNDO:
        return _end(case, exhausted or case.losing_text(), last_chance=True)
    return case.once_more(f"{case.rest_text()}, and even memory on demand {_time(case.hybrid_s)}")


def _end(case: _Case, reason: str, *, last_chance: bool) -> Decision:
    """Choose how to end the rounds, or wait for a better moment unless it is the last chance."""
    if case.fits:
        return case.freeze(reason)
    if case.hybrid_fits and case.hybrid_s < case.freeze_s:
        return case.hybrid(reason)
    if math.isinf(case.budget_s) and case.in_time(case.freeze_s):
        least = min(round_.dirty_pages for round_ in case.rounds)
        if last_chance or case.dirty <= GOOD_MOMENT * least:
            return case.freeze(reason)
    if last_chance:
        return case.give_up(
            f"{reason}; {case.no_hybrid}" if case.strategy is not Strategy.PRECOPY else reason
        )
    return case.once_more(f"{reason}, but a lull may come; {case.rest_text()}")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _size(length_bytes: int) -> str:
    return f"{length_bytes / (1 << 20):.1f} MiB" if length_bytes >= 1 << 20 else f"{length_bytes >> 10} KiB"
