"""Sets of addresses as sorted, disjoint half-open ranges (start, end)."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

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
