"""The timeline of a move: what happened when, at both ends, noted while it goes on.

Noting is a tuple and an append, because it happens while the program is frozen; all else waits for
`write`. Several threads may note at once.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from operator import attrgetter
from pathlib import Path
from typing import Final

from godwit.migrate import outfile, tracefile
from godwit.migrate.recording import (
    DIRTY_PAGES,
    FAULT,
    FREEZE,
    ROUND,
    Arg,
    Counter,
    Instant,
    Recording,
    Span,
    Track,
)
from godwit.migrate.tracefile import read

__all__ = ["DISABLED", "LIMIT", "Recording", "Timeline", "Track", "read"]

LIMIT: Final = 200_000  # events kept

# Of what a peer claims, nothing further than a fortnight from the common moment is believed.
_FAR_NS: Final = 1 << 50


class Timeline:
    """What is noted while a move goes on. When it is full, what comes later is counted only.

    Page faults, of which there may be any number, have a room of their own, so that they cannot push
    out the few spans that tell the story.
    """

    __slots__ = ("_counters", "_faults", "_instants", "_limit", "_spans", "dropped", "migration", "strategy")

    def __init__(self, migration: str = "", strategy: str = "", *, limit: int = LIMIT) -> None:
        self.migration = migration
        self.strategy = strategy
        self.dropped = 0
        self._limit = limit
        self._spans: list[tuple[str, Track, int, int, dict[str, Arg]]] = []
        self._faults: list[tuple[int, int, int, int]] = []
        self._instants: list[tuple[str, Track, int, dict[str, Arg]]] = []
        self._counters: list[tuple[str, Track, int, int | float]] = []

    def now(self) -> int:
        """Return the time, as all methods want it."""
        return time.monotonic_ns()

    def span(self, name: str, track: Track, start_ns: int, end_ns: int, /, **args: Arg) -> None:
        """Note what is over."""
        if len(self._spans) < self._limit // 10:
            self._spans.append((name, track, start_ns, end_ns, args))
        else:
            self.dropped += 1

    def during(self, name: str, track: Track, /, **args: Arg) -> AbstractContextManager[None]:
        """Note what the block takes, however it is left."""
        return _During(self, name, track, args)

    def add_remote(self, name: str, start_ns: int, duration_ns: int, offset_ns: int, /, **args: Arg) -> None:
        """Note what the destination tells of itself; what cannot be true is dropped.

        Args:
            name: Of the span.
            start_ns: When it began there, after a moment common to both; may be negative.
            duration_ns: How long it took.
            offset_ns: The common moment, on the clock here.
            **args: What else there is to say.
        """
        if -_FAR_NS <= start_ns <= _FAR_NS and 0 <= duration_ns <= _FAR_NS:
            start_ns += offset_ns
            self.span(name, Track.DESTINATION, start_ns, start_ns + duration_ns, **args)
        else:
            self.dropped += 1

    def instant(self, name: str, track: Track, at_ns: int, /, **args: Arg) -> None:
        """Note a moment."""
        if len(self._instants) < self._limit // 20:
            self._instants.append((name, track, at_ns, args))
        else:
            self.dropped += 1

    def counter(self, name: str, track: Track, at_ns: int, value: float, /) -> None:
        """Note a quantity, which holds until the next of that name."""
        if len(self._counters) < self._limit // 20:
            self._counters.append((name, track, at_ns, value))
        else:
            self.dropped += 1

    def frozen(self, start_ns: int, end_ns: int) -> None:
        """Note that the program stood still."""
        self.span(FREEZE, Track.PROGRAM, start_ns, end_ns)

    def round(self, number: int, start_ns: int, end_ns: int, /, *, sent_pages: int, dirty_pages: int) -> None:
        """Note a round of pre-copy, and how many pages were dirty again at its end."""
        self.span(
            ROUND,
            Track.SOURCE,
            start_ns,
            end_ns,
            number=number,
            sent_pages=sent_pages,
            dirty_pages=dirty_pages,
        )
        self.counter(DIRTY_PAGES, Track.SOURCE, end_ns, dirty_pages)

    def fault(self, start_ns: int, end_ns: int, address: int, pages: int = 1) -> None:
        """Note a page fault of the moved program: from its arrival until its pages were there."""
        if len(self._faults) < self._limit * 8 // 10:
            self._faults.append((start_ns, end_ns, address, pages))
        else:
            self.dropped += 1

    def recording(self) -> Recording:
        """Return what was noted until now, in order of time."""
        spans = [
            Span(name=name, track=track, start_ns=start_ns, end_ns=max(start_ns, end_ns), args=args)
            for name, track, start_ns, end_ns, args in self._spans
        ]
        spans += [
            Span(
                name=FAULT,
                track=Track.FAULTS,
                start_ns=start_ns,
                end_ns=max(start_ns, end_ns),
                args={"address": f"{address:#x}", "pages": pages},
            )
            for start_ns, end_ns, address, pages in self._faults
        ]
        # Of two that agree in both ends, the one noted later was the outer.
        spans.reverse()
        spans.sort(key=lambda span: (span.start_ns, -span.end_ns))
        at_ns = attrgetter("at_ns")
        instants = [Instant(name=a, track=b, at_ns=c, args=d) for a, b, c, d in self._instants]
        counters = [Counter(name=a, track=b, at_ns=c, value=d) for a, b, c, d in self._counters]
        return Recording(
            migration=self.migration,
            strategy=self.strategy,
            spans=tuple(spans),
            instants=tuple(sorted(instants, key=at_ns)),
            counters=tuple(sorted(counters, key=at_ns)),
            dropped=self.dropped,
        )

    def write(self, path: Path) -> None:
        """Write what was noted until now to a file, whole or not at all.

        Raises:
            RequestError: The path cannot be written. `outfile.check` tells most of that beforehand.
            DestinationError: There is no room for it.
        """
        outfile.write(path, tracefile.encode(self.recording()))


class _During:
    __slots__ = ("_args", "_name", "_start_ns", "_timeline", "_track")

    def __init__(self, timeline: Timeline, name: str, track: Track, args: dict[str, Arg]) -> None:
        self._timeline = timeline
        self._name = name
        self._track = track
        self._args = args

    def __enter__(self) -> None:
        self._start_ns = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        self._timeline.span(self._name, self._track, self._start_ns, time.monotonic_ns(), **self._args)


_NOTHING: Final = contextlib.nullcontext()


class _Disabled(Timeline):
    """Notes nothing and writes nothing."""

    __slots__ = ()

    def now(self) -> int:
        return 0

    def span(self, name: str, track: Track, start_ns: int, end_ns: int, /, **args: Arg) -> None:
        pass

    def during(self, name: str, track: Track, /, **args: Arg) -> AbstractContextManager[None]:  # noqa: ARG002
        return _NOTHING

    def add_remote(self, name: str, start_ns: int, duration_ns: int, offset_ns: int, /, **args: Arg) -> None:
        pass

    def instant(self, name: str, track: Track, at_ns: int, /, **args: Arg) -> None:
        pass

    def counter(self, name: str, track: Track, at_ns: int, value: float, /) -> None:
        pass

    def round(self, number: int, start_ns: int, end_ns: int, /, *, sent_pages: int, dirty_pages: int) -> None:
        pass

    def fault(self, start_ns: int, end_ns: int, address: int, pages: int = 1) -> None:
        pass

    def write(self, path: Path) -> None:
        pass


DISABLED: Final[Timeline] = _Disabled()
