"""The two close-ups of a move's picture: what the freeze went into, and how long page faults took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from godwit.cli import svg
from godwit.cli.output import counted
from godwit.cli.svg import Drawing, Scale, duration, fitting
from godwit.migrate import timesummary
from godwit.migrate.recording import Instant, Span
from godwit.migrate.timesummary import Step, Summary

_LEFT: Final = 330
_RIGHT: Final = 1170
_ROW: Final = 20
_MAX_STEPS: Final = 40
_MARK_ROWS: Final = 4
_MAX_MARKS: Final = 200
_HISTOGRAM_HEIGHT: Final = 150
_MIN_BINS: Final = 16
_BINS_PER_OCTAVE: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Where in the picture of the whole move the freeze is."""

    left: float
    right: float
    bottom: float


def freeze(drawing: Drawing, window: Window, span: Span, summary: Summary, marks: Sequence[Instant]) -> float:
    """Draw the freeze enlarged, a row for each step; return where the panel ends."""
    scale = Scale(start_ns=span.start_ns, end_ns=span.end_ns, left=_LEFT, right=_RIGHT)
    top = window.bottom + 26
    steps, left_out = _chosen(summary.steps)
    bottom = top + 56 + _ROW * len(steps)
    for start, end in ((window.left, _LEFT), (window.right, _RIGHT)):
        # Not through the labels of the axis.
        drawing.path([(start, window.bottom), (end, top + 30)], "zoom")
        drawing.path([(end, top + 50), (end, bottom)], "zoom")
    drawing.text(20, top + 18, f"The freeze: {span.duration_ns / 1e6:.3f} ms", "head")
    _legend(drawing, top + 38)
    drawing.axis(scale, top + 44, top + 50, bottom)
    for row, step in enumerate(steps):
        _step(drawing, scale, step, top + 54 + row * _ROW)
    notes = [f"{summary.unnoted_ms:.3f} ms in no step"] if summary.unnoted_ms >= 0.0005 else []
    if left_out:
        took_ms = sum(step.ms for step in left_out)
        notes.append(f"{counted(len(left_out), 'shorter step')} not shown, {took_ms:.3f} ms")
    bottom = _marks(drawing, scale, marks, top + 50, bottom)
    drawing.text(20, bottom + 14, "; ".join(notes), "faint")
    return bottom + 30


def _chosen(steps: Sequence[Step]) -> tuple[list[Step], list[Step]]:
    """Return the longest steps that have room, in order of time, and the others."""
    if len(steps) <= _MAX_STEPS:
        return list(steps), []
    by_length = sorted(range(len(steps)), key=lambda at: -steps[at].ms)
    kept = set(by_length[:_MAX_STEPS])
    return (
        [step for at, step in enumerate(steps) if at in kept],
        [step for at, step in enumerate(steps) if at not in kept],
    )


def _legend(drawing: Drawing, base: float) -> None:
    for left, track in ((20, "source"), (90, "destination")):
        drawing.rect(left, base - 9, 10, 10, f"bar {track}")
        drawing.text(left + 15, base, track, "faint")


def _step(drawing: Drawing, scale: Scale, step: Step, top: float) -> None:
    indent = 20 + 14 * min(step.depth, 6)
    drawing.text(indent, top + 14, fitting(step.name, _LEFT - 90 - indent))
    drawing.text(_LEFT - 14, top + 14, f"{step.ms:.3f} ms", "number", "end")
    start_ns = scale.start_ns + step.start_ms * 1e6
    left, right = scale.x(start_ns), scale.x(start_ns + step.ms * 1e6)
    told = f"{fitting(step.name, 600)} ({step.track}): {step.ms:.3f} ms, from {step.start_ms:.3f} ms on"
    drawing.rect(
        min(left, _RIGHT - 1.5), top + 3, max(1.5, right - left), _ROW - 5, f"bar {step.track}", told
    )


def _marks(drawing: Drawing, scale: Scale, marks: Sequence[Instant], top: float, bottom: float) -> float:
    """Draw moments as upright lines, with their names below; return where the lowest ends.

    A name stands left of its line, as high as no other name and no line is in its way.
    """
    until = [0.0] * _MARK_ROWS
    used = 0
    for each in marks[:_MAX_MARKS]:
        x = scale.x(each.at_ns)
        label = fitting(each.name, 200)
        left = x - 4 - svg.width_px(label)
        row = next((row for row, end in enumerate(until) if left > end), None)
        end = bottom if row is None else bottom + 14 * (row + 1)
        after_ms = (each.at_ns - scale.start_ns) / 1e6
        drawing.line((x, top), (x, end), "mark", f"{fitting(each.name, 600)} at {after_ms:.3f} ms")
        if row is not None:
            drawing.text(x - 4, end, label, "hot", "end")
            until[: row + 1] = [x + 2] * (row + 1)
            used = max(used, row + 1)
    return bottom + 14 * used


def faults(drawing: Drawing, top: float, latencies_ns: Sequence[int]) -> float:
    """Draw how long page faults took, over a logarithmic axis; return where the panel ends.

    Args:
        drawing: Where to draw.
        top: Where the panel begins.
        latencies_ns: Not empty; the shortest first.
    """
    first, counts = bins_of(latencies_ns)
    left, bottom = 130.0, top + 60 + _HISTOGRAM_HEIGHT
    wide = (_RIGHT - left) / len(counts)
    most = max(counts)
    drawing.text(20, top + 26, f"Page faults: {len(latencies_ns):,}", "head")
    drawing.text(left - 8, bottom - _HISTOGRAM_HEIGHT + 4, f"{most:,}", "faint", "end")
    drawing.text(left - 8, bottom + 4, "0", "faint", "end")
    for y in (bottom - _HISTOGRAM_HEIGHT, bottom):
        drawing.line((left, y), (_RIGHT, y), "grid")
    for at, count in enumerate(counts):
        height = _HISTOGRAM_HEIGHT * count / most
        if count:
            told = f"{duration(_edge_ns(first + at))} to {duration(_edge_ns(first + at + 1))}: {count:,}"
            drawing.rect(left + at * wide, bottom - height, wide, height, "bar faults", told)

    def x_of(latency_ns: float) -> float:
        return left + (_BINS_PER_OCTAVE * math.log2(max(1, latency_ns)) - first) * wide

    until = 0.0
    for latency_ns in _round_latencies(_edge_ns(first), _edge_ns(first + len(counts))):
        x, label = x_of(latency_ns), _short(latency_ns)
        room = svg.width_px(label) / 2
        if x - room > until and x + room <= _RIGHT + 20:
            drawing.line((x, bottom), (x, bottom + 5), "rule")
            drawing.text(x, bottom + 18, label, "faint", "middle")
            until = x + room + 10
    for row, (name, percent) in enumerate((("median", 50), ("p99", 99))):
        value = timesummary.percentile(latencies_ns, percent)
        _percentile(drawing, x_of(value), f"{name} {duration(value)}", bottom, row)
    return bottom + 26


def _percentile(drawing: Drawing, x: float, label: str, bottom: float, row: int) -> None:
    base = bottom - _HISTOGRAM_HEIGHT - 20 + 14 * row
    drawing.line((x, base + 3), (x, bottom), "mark")
    beyond = x + svg.width_px(label) + 6 > _RIGHT
    drawing.text(x - 4 if beyond else x + 4, base, label, "hot", "end" if beyond else "start")


def bins_of(latencies_ns: Sequence[int]) -> tuple[int, list[int]]:
    """Count latencies in half octaves; return the number of the first bin, and the counts."""
    numbers = [math.floor(_BINS_PER_OCTAVE * math.log2(max(1, each))) for each in latencies_ns]
    first, last = min(numbers), max(numbers)
    if (missing := _MIN_BINS - (last - first + 1)) > 0:
        first = max(0, first - missing // 2)
        last = max(last, first + _MIN_BINS - 1)
    counts = [0] * (last - first + 1)
    for number in numbers:
        counts[number - first] += 1
    return first, counts


def _edge_ns(number: int) -> float:
    return math.exp2(number / _BINS_PER_OCTAVE)


def _round_latencies(low_ns: float, high_ns: float) -> list[float]:
    powers = range(math.floor(math.log10(max(1, low_ns))), math.ceil(math.log10(max(1, high_ns))) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [each for each in found if low_ns <= each <= high_ns]


def _short(length_ns: float) -> str:
    units = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
    unit, name = next(each for each in units if length_ns >= each[0] or each[1] == "ns")
    return f"{length_ns / unit:g} {name}"
