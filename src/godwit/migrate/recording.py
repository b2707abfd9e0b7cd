"""What a timeline holds, once it is over: spans, instants and counters.

Times are nanoseconds of the source's CLOCK_MONOTONIC.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

# The names that the summary and the plot know.
FREEZE: Final = "frozen"  # a span of the program
ROUND: Final = "round"  # a span of the source, with `number`, `sent_pages` and `dirty_pages`
DIRTY_PAGES: Final = "dirty pages"  # a counter of the source
FAULT: Final = "page fault"  # a span of the faults, with `address` and `pages`

Arg = int | float | str


class Track(enum.StrEnum):
    """Whose time it was."""

    PROGRAM = "program"
    SOURCE = "source"
    DESTINATION = "destination"
    FAULTS = "faults"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took a while."""

    name: str
    track: Track
    start_ns: int
    end_ns: int
    args: dict[str, Arg] = field(default_factory=dict[str, Arg])

    @property
    def duration_ns(self) -> int:
        """How long it took."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """Something that took no time."""

    name: str
    track: Track
    at_ns: int
    args: dict[str, Arg] = field(default_factory=dict[str, Arg])


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """A quantity, from this moment to its next value."""

    name: str
    track: Track
    at_ns: int
    value: int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A finished timeline, each kind in order of time; of spans that begin together, the outer first."""

    migration: str
    strategy: str
    spans: tuple[Span, ...] = ()
    instants: tuple[Instant, ...] = ()
    counters: tuple[Counter, ...] = ()
    dropped: int = 0  # events for which there was no room

    @property
    def start_ns(self) -> int:
        """The first moment; 0 when nothing was noted."""
        starts = [span.start_ns for span in self.spans[:1]]
        starts += [instant.at_ns for instant in self.instants[:1]]
        starts += [counter.at_ns for counter in self.counters[:1]]
        return min(starts, default=0)

    @property
    def end_ns(self) -> int:
        """The last moment; 0 when nothing was noted."""
        ends = [span.end_ns for span in self.spans]
        ends += [instant.at_ns for instant in self.instants[-1:]]
        ends += [counter.at_ns for counter in self.counters[-1:]]
        return max(ends, default=0)
