"""What a timeline comes to: the freeze and its steps, the rounds, the page faults, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from godwit.migrate.recording import FAULT, FREEZE, ROUND, Recording, Span, Track


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The part of a span that lies inside the freeze."""

    name: str
    track: str
    depth: int  # how many other steps of its track it lies in
    start_ms: float  # after the start of the freeze
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A round of pre-copy."""

    number: int
    ms: float
    sent_pages: int
    dirty_pages: int  # at its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How long page faults took after the move."""

    count: int
    median_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`docs/formats/json.md`."""

    migration: str
    strategy: str
    total_ms: float
    freeze_ms: float | None  # None: it was never frozen
    steps: tuple[Step, ...]
    unnoted_ms: float  # of the freeze, what lies in no step
    rounds: tuple[Round, ...]
    faults: Faults
    dropped: int


def summarise(recording: Recording) -> Summary:
    """Return the numbers of a recording."""
    freeze = freeze_of(recording)
    steps = steps_of(recording, freeze) if freeze else ()
    latencies = fault_latencies_ns(recording)
    return Summary(
        migration=recording.migration,
        strategy=recording.strategy,
        total_ms=_ms(recording.end_ns - recording.start_ns),
        freeze_ms=_ms(freeze.duration_ns) if freeze else None,
        steps=steps,
        unnoted_ms=_unnoted_ms(freeze, steps) if freeze else 0.0,
        rounds=tuple(
            Round(
                number=_whole(span, "number"),
                ms=_ms(span.duration_ns),
                sent_pages=_whole(span, "sent_pages"),
                dirty_pages=_whole(span, "dirty_pages"),
            )
            for span in recording.spans
            if span.name == ROUND and span.track is Track.SOURCE
        ),
        faults=Faults(
            count=len(latencies),
            median_ms=_ms(percentile(latencies, 50)),
            p99_ms=_ms(percentile(latencies, 99)),
            max_ms=_ms(percentile(latencies, 100)),
        ),
        dropped=recording.dropped,
    )


def freeze_of(recording: Recording) -> Span | None:
    """Return the freeze; the last, should it have been tried several times."""
    found = [span for span in recording.spans if span.name == FREEZE and span.track is Track.PROGRAM]
    return found[-1] if found else None


def steps_of(recording: Recording, freeze: Span) -> tuple[Step, ...]:
    """Return what source and destination did inside the freeze, in order of time.

    What began before and ended after it, as the whole move, is no step.
    """
    steps: list[Step] = []
    above: dict[Track, list[int]] = {Track.SOURCE: [], Track.DESTINATION: []}
    for span in recording.spans:
        if span.track not in above or span.start_ns >= freeze.end_ns or span.end_ns <= freeze.start_ns:
            continue
        if span.start_ns <= freeze.start_ns and span.end_ns >= freeze.end_ns:
            continue
        ends = above[span.track]
        while ends and (ends[-1] <= span.start_ns or ends[-1] < span.end_ns):
            ends.pop()
        start_ns = max(span.start_ns, freeze.start_ns)
        steps.append(
            Step(
                name=span.name,
                track=span.track.value,
                depth=len(ends),
                start_ms=_ms(start_ns - freeze.start_ns),
                ms=_ms(min(span.end_ns, freeze.end_ns) - start_ns),
            )
        )
        ends.append(span.end_ns)
    return tuple(steps)


def fault_latencies_ns(recording: Recording) -> list[int]:
    """Return how long each page fault took, the shortest first."""
    return sorted(
        span.duration_ns for span in recording.spans if span.track is Track.FAULTS and span.name == FAULT
    )


def percentile(ordered: Sequence[int], percent: int) -> int:
    """Return the smallest value that so many percent do not exceed; 0 when there is none."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0


def _unnoted_ms(freeze: Span, steps: Iterable[Step]) -> float:
    noted_ms = until_ms = 0.0
    for step in sorted(steps, key=lambda step: step.start_ms):
        end_ms = step.start_ms + step.ms
        noted_ms += max(0.0, end_ms - max(until_ms, step.start_ms))
        until_ms = max(until_ms, end_ms)
    return round(max(0.0, freeze.duration_ns / 1e6 - noted_ms), 6)


def _whole(span: Span, name: str) -> int:
    value = span.args.get(name)
    return value if isinstance(value, int) else 0


def _ms(length_ns: int) -> float:
    return round(length_ns / 1e6, 6)
