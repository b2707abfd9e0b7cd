"""Sets of addresses as sorted, disjoint half-open ranges (start, end)."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]
Ranges = Sequence[Range]


def union(ranges: Iterable[Range]) -> list[Range]:
    """Return the ranges sorted, with those that touch or overlap joined."""
    return coalesce(sorted(ranges), 0)


def coalesce(ranges: Iterable[Range], gap: int) -> list[Range]:
    """Join sorted ranges that are no more than `gap` apart."""
    joined: list[Range] = []
    for start, end in ranges:
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def intersect(first: Ranges, second: Ranges) -> list[Range]:
    """Return what is in both."""
    found: list[Range] = []
    at = 0
    for start, end in first:
        while at < len(second) and second[at][1] <= start:
            at += 1
        index = at
        while index < len(second) and second[index][0] < end:
            found.append((max(start, second[index][0]), min(end, second[index][1])))
            index += 1
    return found


def subtract(first: Ranges, second: Ranges) -> list[Range]:
    """Return what is in the first and not in the second."""
    left: list[Range] = []
    at = 0
    for range_start, end in first:
        start = range_start
        while at < len(second) and second[at][1] <= start:
            at += 1
        index = at
        while start < end and index < len(second) and second[index][0] < end:
            if start < second[index][0]:
                left.append((start, second[index][0]))
            start = max(start, second[index][1])
            index += 1
        if start < end:
            left.append((start, end))
    return left


def contains(ranges: Ranges, address: int) -> bool:
    """Tell whether an address is in the set."""
    index = bisect.bisect_right(ranges, (address, 1 << 64)) - 1
    return index >= 0 and address < ranges[index][1]


def total(ranges: Iterable[Range]) -> int:
    """Return how many bytes there are."""
    return sum(end - start for start, end in ranges)


class RangeSet:
    """A set of addresses, changed in place: taking a range out costs no more than what is found there."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        joined = union(ranges)
        self._starts = [start for start, _ in joined]
        self._ends = [end for _, end in joined]

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[Range]:
        return zip(self._starts, self._ends, strict=True)

    def copy(self) -> RangeSet:
        """Return a set of its own with the same content."""
        made = RangeSet()
        made._starts, made._ends = self._starts.copy(), self._ends.copy()
        return made

    def total(self) -> int:
        """Return how many bytes there are."""
        return sum(self._ends) - sum(self._starts)

    def within(self, start: int, end: int) -> list[Range]:
        """Return what the set has of a range."""
        first = bisect.bisect_right(self._ends, start)
        beyond = bisect.bisect_left(self._starts, end, first)
        return [(max(start, self._starts[at]), min(end, self._ends[at])) for at in range(first, beyond)]

    def remove(self, start: int, end: int) -> list[Range]:
        """Take a range out; return what there was of it."""
        found = self.within(start, end)
        if not found:
            return found
        first = bisect.bisect_right(self._ends, start)
        beyond = bisect.bisect_left(self._starts, end, first)
        left = [
            part
            for part in ((self._starts[first], start), (end, self._ends[beyond - 1]))
            if part[0] < part[1]
        ]
        self._starts[first:beyond] = [part[0] for part in left]
        self._ends[first:beyond] = [part[1] for part in left]
        return found

    def add(self, start: int, end: int) -> None:
        """Put a range in."""
        first = bisect.bisect_left(self._ends, start)
        beyond = bisect.bisect_right(self._starts, end, first)
        if first < beyond:
            start, end = min(start, self._starts[first]), max(end, self._ends[beyond - 1])
        self._starts[first:beyond] = [start]
        self._ends[first:beyond] = [end]

    def first(self) -> Range | None:
        """Return the lowest range, None if there is none."""
        return (self._starts[0], self._ends[0]) if self._starts else None

    def after(self, address: int) -> Range | None:
        """Return the first range that goes beyond an address, from there on; None if there is none."""
        at = bisect.bisect_right(self._ends, address)
        return (max(address, self._starts[at]), self._ends[at]) if at < len(self._starts) else None
