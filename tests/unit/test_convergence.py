"""When a move stops copying and freezes: recorded programs, and the rules one by one."""

from __future__ import annotations

import dataclasses

import pytest

from godwit.migrate import convergence
from godwit.migrate.convergence import Decision, Limits, Round, Step, Strategy, decide, eta_s, fixed_freeze_s

FIXED_S = fixed_freeze_s(1, 4, 10, 40)

# Recorded with a writer in C, PAGEMAP_SCAN, process_vm_readv and TCP over loopback on two busy cores, each
# round sent at once whatever the last one said: pages, bytes, seconds, dirty pages, seconds of the scan.
Trace = tuple[tuple[int, int, float, int, float], ...]
TRACES: dict[str, Trace] = {
    "1 GiB, idle": (
        (262144, 1073807376, 2.88935, 0, 0.00045),
        (0, 16, 0.00062, 0, 0.00026),
    ),
    "4 MiB, 20 MiB/s over an eighth": (
        (1024, 4194576, 0.00365, 20, 0.00001),
        (20, 82224, 0.00026, 0, 0.00001),
    ),
    "1 GiB, 64 MiB/s at random": (
        (262144, 1073807376, 1.52780, 23772, 0.00169),
        (23772, 97715040, 0.31570, 5127, 0.00069),
        (5127, 21080384, 0.07752, 1267, 0.00060),
        (1267, 5209808, 0.01979, 326, 0.00042),
        (326, 1340528, 0.00544, 91, 0.00044),
        (91, 374208, 0.00194, 30, 0.00040),
    ),
    "1 GiB, as much at random as it can": (
        (262144, 1073807376, 0.66388, 72038, 0.00489),
        (72038, 295902768, 0.68674, 74868, 0.00478),
        (74868, 307512384, 0.71082, 76836, 0.00512),
        (76836, 315587296, 0.71357, 77220, 0.00502),
        (77220, 317164912, 0.67943, 74001, 0.00479),
        (74001, 303958784, 0.69305, 75334, 0.00491),
        (75334, 309427312, 0.67654, 73586, 0.00460),
    ),
    "32 MiB of 512 over and over": (
        (131072, 536903696, 0.46723, 8192, 0.00084),
        (8192, 33556496, 0.01447, 8192, 0.00080),
        (8192, 33556496, 0.01412, 8192, 0.00079),
        (8192, 33556496, 0.01410, 8192, 0.00077),
        (8192, 33556496, 0.01409, 8192, 0.00078),
        (8192, 33556496, 0.01411, 8192, 0.00075),
    ),
    "2 MiB of 512 over and over": (
        (131072, 536903696, 0.40317, 512, 0.00027),
        (512, 2097296, 0.00130, 512, 0.00024),
        (512, 2097296, 0.00113, 512, 0.00022),
    ),
    "32 MiB of 256 over and over, 12 MiB/s": (
        (65536, 268451856, 21.33477, 8192, 0.00068),
        (8192, 33556496, 2.66695, 8192, 0.00070),
        (8192, 33556496, 2.66695, 8192, 0.00073),
        (8192, 33556496, 2.66695, 8192, 0.00069),
        (8192, 33556496, 2.66695, 8192, 0.00066),
        (8192, 33556496, 2.66699, 8192, 0.00088),
    ),
    "64 MiB, more at random than 12 MiB/s": (
        (16384, 67112976, 5.33383, 16301, 0.00077),
        (16301, 66773744, 5.30680, 16293, 0.00076),
        (16293, 66740960, 5.30419, 16284, 0.00081),
    ),
    "512 MiB, skewed, 110 MiB/s": (
        (131072, 536903696, 4.65499, 30106, 0.00262),
        (30106, 123605920, 1.07173, 9610, 0.00069),
        (9610, 39477504, 0.34229, 3638, 0.00048),
        (3638, 14949024, 0.12967, 1526, 0.00035),
        (1526, 6271264, 0.05441, 668, 0.00035),
        (668, 2745712, 0.02384, 336, 0.00024),
        (336, 1381152, 0.01264, 176, 0.00027),
        (176, 723424, 0.00635, 110, 0.00024),
    ),
    "1 GiB, nine tenths empty": (
        (262144, 116700656, 0.27055, 1356, 0.00062),
        (1356, 5575728, 0.01401, 72, 0.00043),
        (72, 296080, 0.00137, 5, 0.00037),
    ),
    "128 MiB, bursts of 64, 60 MiB/s": (
        (32768, 134225936, 2.13356, 18643, 0.00085),
        (18643, 76382192, 1.21415, 1497, 0.00019),
        (1497, 6147088, 0.09779, 151, 0.00009),
        (151, 620832, 0.00990, 15, 0.00005),
    ),
}


def rounds_of(trace: Trace) -> tuple[Round, ...]:
    return tuple(Round(pages=a, bytes=b, seconds=c, dirty_pages=d, scan_s=e) for a, b, c, d, e in trace)


def limits(
    max_freeze_s: float | None = None, *, left_s: float | None = None, postcopy: bool = True
) -> Limits:
    return Limits(max_freeze_s=max_freeze_s, fixed_freeze_s=FIXED_S, seconds_left=left_s, postcopy=postcopy)


def play(strategy: Strategy, rounds: tuple[Round, ...], limit: Limits) -> tuple[int, Decision]:
    """Return after how many of the recorded rounds it ended, and how."""
    for count in range(1, len(rounds) + 1):
        decision = decide(strategy, rounds[:count], limit)
        if decision.step is not Step.ROUND:
            return count, decision
    raise AssertionError(f"{len(rounds)} rounds were not enough")


AUTO, PRECOPY = Strategy.AUTO, Strategy.PRECOPY
FREEZE, HYBRID, GIVE_UP = Step.FREEZE, Step.HYBRID, Step.GIVE_UP


@pytest.mark.parametrize(
    ("name", "strategy", "budget_s", "count", "step"),
    [
        ("1 GiB, idle", AUTO, None, 1, FREEZE),
        ("4 MiB, 20 MiB/s over an eighth", AUTO, 0.02, 1, FREEZE),
        ("1 GiB, 64 MiB/s at random", AUTO, None, 5, FREEZE),
        ("1 GiB, 64 MiB/s at random", PRECOPY, 0.02, 5, FREEZE),
        ("1 GiB, 64 MiB/s at random", PRECOPY, 0.0095, 6, FREEZE),
        ("1 GiB, 64 MiB/s at random", Strategy.HYBRID, None, 2, HYBRID),
        ("1 GiB, as much at random as it can", AUTO, None, 3, HYBRID),
        ("1 GiB, as much at random as it can", PRECOPY, None, 3, FREEZE),
        ("1 GiB, as much at random as it can", PRECOPY, 0.2, 6, GIVE_UP),
        ("1 GiB, as much at random as it can", PRECOPY, 1.0, 2, FREEZE),
        ("32 MiB of 512 over and over", AUTO, None, 3, HYBRID),
        ("32 MiB of 512 over and over", AUTO, 0.02, 6, GIVE_UP),
        ("2 MiB of 512 over and over", AUTO, None, 1, FREEZE),
        ("2 MiB of 512 over and over", PRECOPY, 0.01, 1, FREEZE),
        ("32 MiB of 256 over and over, 12 MiB/s", AUTO, None, 3, HYBRID),
        ("32 MiB of 256 over and over, 12 MiB/s", PRECOPY, None, 3, FREEZE),
        ("64 MiB, more at random than 12 MiB/s", AUTO, None, 1, HYBRID),
        ("64 MiB, more at random than 12 MiB/s", PRECOPY, 0.2, 3, GIVE_UP),
        ("512 MiB, skewed, 110 MiB/s", AUTO, None, 8, FREEZE),
        ("1 GiB, nine tenths empty", AUTO, None, 2, FREEZE),
        ("128 MiB, bursts of 64, 60 MiB/s", AUTO, None, 4, FREEZE),
        ("128 MiB, bursts of 64, 60 MiB/s", PRECOPY, 0.02, 4, FREEZE),
    ],
)
def test_a_recorded_program_ends_as_it_should(
    name: str, strategy: Strategy, budget_s: float | None, count: int, step: Step
) -> None:
    ended, decision = play(strategy, rounds_of(TRACES[name]), limits(budget_s))
    assert (ended, decision.step) == (count, step), decision.why


def a_round(pages: int, dirty: int, seconds: float | None = None, *, scan_s: float = 0.5e-3) -> Round:
    """Return a round over a line of 100 pages per millisecond."""
    return Round(
        pages=pages,
        bytes=pages * 4096,
        seconds=pages / 1e5 if seconds is None else seconds,
        dirty_pages=dirty,
        scan_s=scan_s,
    )


def step(strategy: Strategy, limit: Limits, *rounds: Round) -> Step:
    return decide(strategy, rounds, limit).step


GOOD = (a_round(100_000, 20_000), a_round(20_000, 5_000))  # 50 ms are left, a tenth of that after another
STAYS = (a_round(100_000, 20_000), a_round(20_000, 20_000))  # 200 ms are left, and would be again


def test_a_freeze_costs_what_the_tree_holds() -> None:
    assert fixed_freeze_s(1, 1, 0, 0) == pytest.approx(5e-3)
    assert fixed_freeze_s(3, 5, 10, 100) == pytest.approx(5e-3 + 2 * 2.7e-3 + 2 * 455e-6 + 880e-6 + 700e-6)


def test_strategies_have_the_names_users_type() -> None:
    assert list(map(str, Strategy)) == ["auto", "stopcopy", "precopy", "postcopy", "hybrid"]


@pytest.mark.parametrize("strategy", [AUTO, PRECOPY, Strategy.HYBRID])
def test_the_first_round_is_begun_unless_nothing_can_keep_the_budget(strategy: Strategy) -> None:
    assert step(strategy, limits(0.02)) is Step.ROUND
    assert step(strategy, limits(FIXED_S * 0.99)) is GIVE_UP
    assert step(strategy, limits(left_s=0.1)) is GIVE_UP


@pytest.mark.parametrize("rounds", [(), GOOD, STAYS])
def test_strategies_without_rounds_answer_as_well(rounds: tuple[Round, ...]) -> None:
    assert step(Strategy.STOPCOPY, limits(0.001), *rounds) is FREEZE
    assert step(Strategy.STOPCOPY, limits(left_s=0.1), *rounds) is GIVE_UP
    assert step(Strategy.POSTCOPY, limits(0.05), *rounds) is HYBRID
    assert step(Strategy.POSTCOPY, limits(0.01), *rounds) is GIVE_UP
    assert step(Strategy.POSTCOPY, limits(postcopy=False), *rounds) is GIVE_UP


def test_a_round_is_taken_for_two_milliseconds_but_not_for_less() -> None:
    assert step(AUTO, limits(), a_round(100_000, 220)) is Step.ROUND
    assert step(AUTO, limits(), a_round(100_000, 190)) is FREEZE
    # It does not fit yet, so that less will do.
    assert step(AUTO, limits(FIXED_S + 1e-3), a_round(100_000, 190)) is Step.ROUND


def test_without_a_budget_memory_may_take_a_tenth_of_a_second() -> None:
    alone = limits(postcopy=False)
    assert step(AUTO, alone, a_round(100_000, 9_000), a_round(9_000, 9_000)) is FREEZE
    assert step(AUTO, alone, a_round(100_000, 11_000), a_round(11_000, 11_000)) is Step.ROUND


def test_where_memory_can_follow_it_may_take_a_hundredth() -> None:
    assert step(AUTO, limits(), a_round(100_000, 700), a_round(700, 700)) is FREEZE
    assert step(AUTO, limits(), a_round(100_000, 9_000), *[a_round(9_000, 9_000)] * 2) is HYBRID


def test_slow_progress_is_enough_only_where_there_is_no_better_way() -> None:
    rounds = (a_round(100_000, 80_000), a_round(80_000, 64_000))
    assert step(AUTO, limits(), *rounds) is HYBRID
    assert step(AUTO, limits(postcopy=False), *rounds) is Step.ROUND
    assert step(PRECOPY, limits(), *rounds) is Step.ROUND


def test_one_bad_round_is_no_reason_to_end() -> None:
    rounds = (*GOOD, a_round(5_000, 40_000))
    assert [step(s, limits(0.02), *rounds) for s in (AUTO, PRECOPY)] == [Step.ROUND, Step.ROUND]


def test_two_bad_rounds_are_enough_for_hybrid_and_five_to_undo() -> None:
    bad = (a_round(20_000, 20_000),) * 6
    assert step(AUTO, limits(0.06), *GOOD, *bad[:2]) is HYBRID
    assert step(PRECOPY, limits(0.06), *GOOD, *bad[:4]) is Step.ROUND
    assert step(PRECOPY, limits(0.06), *GOOD, *bad[:5]) is GIVE_UP


def test_a_long_bad_round_is_enough_for_hybrid() -> None:
    assert step(AUTO, limits(), a_round(600_000, 590_000)) is HYBRID
    assert step(AUTO, limits(), a_round(400_000, 390_000)) is Step.ROUND
    assert step(PRECOPY, limits(), a_round(600_000, 590_000)) is Step.ROUND


def test_without_a_budget_a_freeze_waits_for_a_good_moment_but_not_for_ever() -> None:
    peak = (*GOOD, a_round(5_000, 15_000), a_round(15_000, 20_000))
    assert step(PRECOPY, limits(), *peak) is Step.ROUND
    assert step(PRECOPY, limits(), *STAYS, a_round(20_000, 20_500)) is FREEZE
    assert step(PRECOPY, limits(), *peak, *(a_round(20_000, 20_000),) * 3) is FREEZE


def test_rounds_end_by_number_and_by_volume() -> None:
    start = a_round(1_000_000, 20_000)
    shrinking = tuple(a_round(20_000 - i, 14_000) for i in range(29))
    assert step(PRECOPY, limits(0.02), start, *shrinking[:28]) is Step.ROUND
    assert step(PRECOPY, limits(0.02), start, *shrinking) is GIVE_UP
    heavy = (a_round(50_000, 40_000), a_round(40_000, 30_000), a_round(30_000, 25_000))
    assert step(PRECOPY, limits(0.02), *heavy) is Step.ROUND
    assert step(PRECOPY, limits(0.02), *heavy, a_round(25_000, 18_000)) is GIVE_UP
    small = (a_round(1_000, 800), a_round(800, 600), a_round(600, 500), a_round(500, 400))
    assert step(PRECOPY, limits(FIXED_S + 2e-3), *small, a_round(400, 300)) is Step.ROUND


def test_time_is_left_for_an_undo() -> None:
    # Another round takes 200 ms, a freeze 50 ms after GOOD; an undo is noticed within 250.
    assert step(PRECOPY, limits(0.02, left_s=0.37), *GOOD) is Step.ROUND
    assert step(PRECOPY, limits(0.02, left_s=0.35), *GOOD) is GIVE_UP
    assert step(PRECOPY, limits(left_s=0.35), *GOOD) is FREEZE
    assert step(PRECOPY, limits(0.1, left_s=0.35), *GOOD) is FREEZE
    assert step(PRECOPY, limits(0.1, left_s=0.30), *GOOD) is GIVE_UP
    assert step(AUTO, limits(left_s=0.29), *GOOD) is HYBRID
    assert step(AUTO, limits(left_s=0.26), *GOOD) is GIVE_UP


def test_hybrid_takes_a_second_round_only_if_it_halves_what_stays_behind() -> None:
    assert step(Strategy.HYBRID, limits(), a_round(100_000, 40_000)) is Step.ROUND
    assert step(Strategy.HYBRID, limits(), a_round(100_000, 60_000)) is HYBRID
    assert step(Strategy.HYBRID, limits(), a_round(100_000, 40_000), a_round(40_000, 10_000)) is HYBRID
    assert step(Strategy.HYBRID, limits(), a_round(100_000, 500)) is FREEZE


def test_hybrid_without_the_means_is_pre_copy() -> None:
    for rounds in (GOOD, STAYS, (a_round(100_000, 600),), (*STAYS, *STAYS[1:])):
        without = limits(0.02, postcopy=False)
        assert step(Strategy.HYBRID, without, *rounds) is step(PRECOPY, without, *rounds)


def test_hybrid_that_is_too_long_goes_on_until_it_is_hopeless() -> None:
    bad = (a_round(20_000, 20_000),) * 5
    assert step(Strategy.HYBRID, limits(0.015), *GOOD[:1], *bad[:4]) is Step.ROUND
    assert step(Strategy.HYBRID, limits(0.015), *GOOD[:1], *bad) is GIVE_UP


def test_the_hottest_pages_go_along_as_far_as_the_budget_allows() -> None:
    rounds = (a_round(100_000, 95_000), a_round(95_000, 95_000))
    free = decide(AUTO, rounds, limits())
    assert (free.step, free.pages) == (HYBRID, 200)
    tight = decide(AUTO, rounds, limits(free.expected_freeze_s - 1e-3))
    assert tight.step is HYBRID
    assert tight.pages == pytest.approx(100, abs=1)
    # 5000 clean pages leave at most 5001 runs to drop; the rest is counted by the page.
    assert free.expected_freeze_s == pytest.approx(FIXED_S + 0.5e-3 + 3e-3 + 5e-3 + 2.85e-3 + 2e-3, rel=0.05)


def test_a_freeze_also_sends_what_is_written_until_it_holds() -> None:
    decision = decide(AUTO, [a_round(1_000, 200, 10e-3, scan_s=4e-3)], limits())
    assert decision.pages == 200 + 20 * 5
    assert decision.expected_freeze_s == pytest.approx(FIXED_S + 4e-3 + 300 / 1e5)


def test_a_freeze_scans_as_fast_as_the_better_of_the_last_two() -> None:
    rounds = [a_round(100_000, 100, scan_s=30e-3), a_round(100, 0, scan_s=1e-3), a_round(0, 0, scan_s=9e-3)]
    assert decide(AUTO, rounds, limits()).expected_freeze_s == pytest.approx(FIXED_S + 1e-3)


def test_the_speed_of_a_few_pages_is_noise() -> None:
    rounds = (a_round(100_000, 3), a_round(3, 3, 5e-3))
    assert convergence.seconds_per_page(rounds) == pytest.approx(1e-5, rel=0.01)
    # A slower line shows as soon as enough went over it.
    assert convergence.seconds_per_page((*rounds, a_round(4_000, 3, 0.4))) == pytest.approx(1e-4)


def test_what_a_round_takes_besides_pages_gives_the_program_time_to_write() -> None:
    # 10 ms of every round go elsewhere: what is left will not become less, which is seen at once.
    floor = (a_round(100_000, 1_500), a_round(1_500, 600, 25e-3), *(a_round(600, 600, 16e-3),) * 5)
    assert step(PRECOPY, limits(FIXED_S + 3e-3), *floor[:-1]) is Step.ROUND
    assert step(PRECOPY, limits(FIXED_S + 3e-3), *floor) is GIVE_UP
    assert step(PRECOPY, limits(), *floor[:3]) is FREEZE


def test_a_handful_of_pages_takes_a_millisecond() -> None:
    assert convergence.seconds_per_page([a_round(10, 3, 1e-5)]) == pytest.approx(1e-4)
    assert convergence.seconds_per_page([a_round(0, 0, 1.0)]) == 0


def test_empty_memory_does_not_make_a_line_fast() -> None:
    full = a_round(100_000, 1_000)
    packed = dataclasses.replace(full, bytes=full.bytes // 4)
    assert convergence.seconds_per_page([packed]) == pytest.approx(4e-5)
    assert convergence.seconds_per_page([dataclasses.replace(full, bytes=0)]) == pytest.approx(8e-5)
    # Later rounds send what the program writes, and are believed.
    assert convergence.seconds_per_page([packed, dataclasses.replace(full, bytes=0)]) == pytest.approx(1e-5)


def test_the_time_that_remains_counts_what_is_written_meanwhile() -> None:
    assert eta_s([], 1_000) is None
    assert eta_s([a_round(0, 0)], 1_000) is None
    assert eta_s([a_round(100_000, 0)], 50_000) == pytest.approx(0.5)
    assert eta_s([a_round(100_000, 50_000)], 50_000) == pytest.approx(1.0)
    assert eta_s([a_round(100_000, 50_000), a_round(10_000, 0)], 40_000) == pytest.approx(0.8)
    assert eta_s([a_round(100_000, 99_000)], 99_000) == pytest.approx(0.99 * 4)


def test_the_reason_is_a_sentence_with_numbers() -> None:
    undone = decide(PRECOPY, [*GOOD, *(a_round(20_000, 20_000),) * 5], limits(0.06))
    assert undone.why == (
        "giving up: rounds no longer pay: 390.6 MiB/s are written, the line takes 390.6 MiB/s;"
        " 78.7 MiB are left, a freeze takes about 0.21 s, 60.0 ms are allowed"
    )
    assert decide(AUTO, GOOD, limits()).why == (
        "another round: 19.7 MiB are left, a freeze takes about 58.4 ms; about 5.0 MiB after it"
    )
