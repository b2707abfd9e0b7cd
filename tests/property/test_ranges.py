"""Ranges against plain sets of numbers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from godwit.engine import ranges
from godwit.engine.ranges import Range, RangeSet

SPAN = st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))
SPANS = st.lists(SPAN, max_size=12)


def numbers(parts: object) -> set[int]:
    found: set[int] = set()
    for start, end in parts:  # type: ignore[attr-defined]
        assert start < end
        found |= set(range(start, end))
    return found


def is_tidy(parts: list[Range]) -> bool:
    return all(one[1] < other[0] for one, other in itertools.pairwise(parts))


@given(SPANS, SPANS)
def test_sets_of_ranges_are_sets(first: list[Range], second: list[Range]) -> None:
    one, other = ranges.union(first), ranges.union(second)
    assert is_tidy(one)
    assert numbers(one) == numbers(first)
    assert numbers(ranges.intersect(one, other)) == numbers(first) & numbers(second)
    assert numbers(ranges.subtract(one, other)) == numbers(first) - numbers(second)
    assert ranges.total(one) == len(numbers(first))
    assert all(ranges.contains(one, at) == (at in numbers(first)) for at in range(80))


@given(SPANS, SPAN, st.lists(st.tuples(st.booleans(), SPAN), max_size=20))
def test_a_range_set_changes_as_a_set_does(
    start: list[Range], asked: Range, changes: list[tuple[bool, Range]]
) -> None:
    made, expected = RangeSet(start), numbers(start)
    for adds, (first, beyond) in changes:
        if adds:
            made.add(first, beyond)
            expected |= set(range(first, beyond))
        else:
            assert numbers(made.remove(first, beyond)) == expected & set(range(first, beyond))
            expected -= set(range(first, beyond))
        assert is_tidy(list(made))
        assert numbers(made) == expected
        assert made.total() == len(expected)
        assert bool(made) == bool(expected)
    assert numbers(made.within(*asked)) == expected & set(range(*asked))
    later = made.after(asked[0])
    above = [at for at in sorted(expected) if at >= asked[0]]
    assert (later[0] if later else None) == (above[0] if above else None)


@given(SPANS, st.integers(0, 10))
def test_coalescing_joins_what_is_near(parts: list[Range], gap: int) -> None:
    joined = ranges.coalesce(ranges.union(parts), gap)
    assert numbers(parts) <= numbers(joined)
    assert all(other[0] - one[1] > gap for one, other in itertools.pairwise(joined))
