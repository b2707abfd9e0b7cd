"""Measured values: their median, and how they grow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One thing measured several times in one run."""

    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)

    @property
    def runs(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a measured value is held to."""

    limit: float
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A line of the report."""

    name: str
    sample: Sample
    note: str = ""
    target: Target | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What was not measured, and why."""

    name: str
    why: str
    failed: bool = False  # it should have been


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How the freeze grows with the number of something."""

    name: str
    counts: tuple[int, ...]
    samples: tuple[Sample, ...]  # freeze in ms, at each count
    each_us: float  # between the smallest and the largest count
    last_each_us: float  # between the two largest: above `each_us`, it grows faster than the number


def result(
    name: str, unit: str, values: Sequence[float], *, note: str = "", limit: float | None = None
) -> Result:
    """Make a line; with `limit`, say whether the median keeps to it."""
    sample = Sample(unit=unit, values=tuple(round(value, 4) for value in values))
    target = None if limit is None else Target(limit=limit, met=sample.median <= limit)
    return Result(name=name, sample=sample, note=note, target=target)


def size_text(mib: int) -> str:
    """Return a size in words."""
    return f"{mib // KIB} GiB" if mib % KIB == 0 else f"{mib} MiB"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many per cent do not exceed."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100) - 1, 0)]


def growth(name: str, counts: Sequence[int], freezes_ms: Sequence[Sequence[float]]) -> Growth:
    """Fit what one more costs: of the medians, per item, in µs."""
    samples = tuple(Sample(unit="ms", values=tuple(values)) for values in freezes_ms)
    medians = [sample.median for sample in samples]

    def slope(first: int, last: int) -> float:
        return round((medians[last] - medians[first]) * 1000 / (counts[last] - counts[first]), 3)

    return Growth(
        name=name, counts=tuple(counts), samples=samples, each_us=slope(0, -1), last_each_us=slope(-2, -1)
    )
