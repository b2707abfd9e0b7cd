"""The timeline of a move as a picture: an SVG that needs nothing else, or a page with it inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from godwit.cli import svg, timepanels
from godwit.cli.output import counted
from godwit.cli.svg import Drawing, Scale, duration, fitting
from godwit.migrate import timesummary
from godwit.migrate.recording import FREEZE, ROUND, Counter, Instant, Recording, Span, Track
from godwit.migrate.timesummary import Summary

WIDTH: Final = 1200
_LEFT: Final = 130
_RIGHT: Final = 1170
_ROW: Final = 20
_MAX_ROWS: Final = 6
_MAX_BARS: Final = 3000  # of a track: the longest
_MAX_INSTANTS: Final = 500
_MAX_COUNTERS: Final = 4
_COUNTER_HEIGHT: Final = 70
_FAULTS_HEIGHT: Final = 34


def draw(recording: Recording) -> str:
    """Return the SVG of a recording."""
    summary = timesummary.summarise(recording)
    freeze = timesummary.freeze_of(recording)
    drawing = Drawing(WIDTH)
    top = _head(drawing, summary)
    whole = _whole(drawing, top, recording, freeze)
    top = whole.bottom
    if freeze is not None:
        marks = [each for each in recording.instants if freeze.start_ns <= each.at_ns <= freeze.end_ns]
        top = timepanels.freeze(drawing, whole.window, freeze, summary, marks)
    latencies = timesummary.fault_latencies_ns(recording)
    if latencies:
        top = timepanels.faults(drawing, top, latencies)
    return drawing.render(top + 12, headline(summary))


def headline(summary: Summary) -> str:
    """Say the most important number."""
    if summary.freeze_ms is None:
        return "A move that never froze its program"
    return f"A move, frozen for {duration(summary.freeze_ms * 1e6)}"


def facts(summary: Summary) -> str:
    """Say the other numbers, on one line."""
    words = [fitting(summary.strategy, 150), f"total {duration(summary.total_ms * 1e6)}"]
    if summary.rounds:
        words.append(counted(len(summary.rounds), "round"))
    if summary.faults.count:
        median, p99 = (duration(ms * 1e6) for ms in (summary.faults.median_ms, summary.faults.p99_ms))
        words.append(f"{counted(summary.faults.count, 'page fault')}: median {median}, p99 {p99}")
    if summary.dropped:
        words.append(f"{counted(summary.dropped, 'event')} not kept")
    if summary.migration:
        words.append(f"migration {fitting(summary.migration, 300)}")
    return "  ·  ".join(word for word in words if word)


def _head(drawing: Drawing, summary: Summary) -> float:
    drawing.text(20, 34, headline(summary), "title")
    drawing.text(20, 56, facts(summary), "faint")
    return 70


# --- The whole move


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    bottom: float
    window: timepanels.Window


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lane:
    name: str
    height: float
    paint: Callable[[float], None]  # from this height down


def _whole(drawing: Drawing, top: float, recording: Recording, freeze: Span | None) -> _Whole:
    scale = Scale(start_ns=recording.start_ns, end_ns=recording.end_ns, left=_LEFT, right=_RIGHT)
    lanes = _lanes(drawing, scale, recording)
    drawing.text(20, top + 18, "The whole move", "head")
    axis = top + 54
    bottom = axis + 8 + sum(lane.height + 6 for lane in lanes)
    drawing.axis(scale, axis, axis + 4, bottom)
    at = axis + 8
    for lane in lanes:
        drawing.text(20, at + 14, fitting(lane.name, _LEFT - 26))
        lane.paint(at)
        at += lane.height + 6
        drawing.line((20, at - 3), (_RIGHT, at - 3), "grid")
    left, right = (scale.x(freeze.start_ns), scale.x(freeze.end_ns)) if freeze else (_LEFT, _RIGHT)
    if freeze is not None:
        label = f"frozen {duration(freeze.duration_ns)}"
        room = svg.width_px(label) / 2
        middle = min(max((left + right) / 2, _LEFT + room), _RIGHT - room)
        drawing.text(middle, axis - 18, label, "hot", "middle")
        drawing.rect(left, axis - 12, max(1.5, right - left), bottom - axis + 12, "freeze band")
    window = timepanels.Window(left=left, right=max(right, left + 1.5), bottom=bottom)
    return _Whole(bottom=bottom + 8, window=window)


def _lanes(drawing: Drawing, scale: Scale, recording: Recording) -> list[_Lane]:
    found: list[_Lane] = []
    for track in Track:
        spans = [span for span in recording.spans if span.track is track]
        instants = [each for each in recording.instants if each.track is track]
        if not spans and not instants:
            continue
        lane = _fault_lane if track is Track.FAULTS else _span_lane
        found.append(lane(drawing, scale, track, spans, instants[:_MAX_INSTANTS]))
    names = list(dict.fromkeys(counter.name for counter in recording.counters))[:_MAX_COUNTERS]
    for name in names:
        values = [counter for counter in recording.counters if counter.name == name]
        found.append(_counter_lane(drawing, scale, values, timesummary.freeze_of(recording)))
    return found


def _span_lane(
    drawing: Drawing, scale: Scale, track: Track, spans: Sequence[Span], instants: Sequence[Instant]
) -> _Lane:
    if len(spans) > _MAX_BARS:
        shortest = sorted(spans, key=lambda span: span.duration_ns)[-_MAX_BARS].duration_ns
        spans = [span for span in spans if span.duration_ns >= shortest][:_MAX_BARS]
    rows = packed(spans)
    height = _ROW * (min(_MAX_ROWS, max(row for row, _ in rows) + 1) if rows else 1)

    def paint(top: float) -> None:
        for row, span in rows:
            if row < _MAX_ROWS:
                _bar(drawing, scale, track, span, top + row * _ROW)
        teeth = [(scale.x(each.at_ns), top, top + height) for each in instants]
        for each, tooth in zip(instants, teeth, strict=True):
            drawing.combs([tooth], f"tick {track.value}", _told(each.name, each.at_ns, scale, ""))

    return _Lane(name=track.value, height=height, paint=paint)


def packed(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """Give each span the first free row, from 0 up, that is below all spans in which it lies.

    Args:
        spans: In order of time, the outer first.
    """
    found: list[tuple[int, Span]] = []
    last: list[Span] = []  # in each row
    for span in spans:
        around = [
            row for row, each in enumerate(last) if each.end_ns > span.start_ns and each.end_ns >= span.end_ns
        ]
        row = around[-1] + 1 if around else 0
        while row < len(last) and last[row].end_ns > span.start_ns:
            row += 1
        if row == len(last):
            if row >= _MAX_ROWS:
                continue
            last.append(span)
        last[row] = span
        found.append((row, span))
    return found


def _bar(drawing: Drawing, scale: Scale, track: Track, span: Span, top: float) -> None:
    left, right = scale.x(span.start_ns), scale.x(span.end_ns)
    kind = "freeze" if span.name == FREEZE and track is Track.PROGRAM else track.value
    told = _told(span.name, span.start_ns, scale, f", took {duration(span.duration_ns)}")
    args = "".join(f", {name} {value}" for name, value in list(span.args.items())[:8])
    drawing.rect(left, top, max(1.0, right - left), _ROW - 2, f"bar {kind}", fitting(told + args, 2000))
    label = f"{span.name} {span.args['number']}" if _is_round(span) else span.name
    shown = fitting(label, right - left - 8)
    if shown != label and _is_round(span):
        shown = fitting(str(span.args["number"]), right - left - 8)
    if shown:
        drawing.text(left + 4, top + 13, shown, "onbar")


def _is_round(span: Span) -> bool:
    return span.name == ROUND and isinstance(span.args.get("number"), int)


def _told(name: str, at_ns: int, scale: Scale, more: str) -> str:
    return f"{fitting(name, 600)} at {duration(at_ns - scale.start_ns)}{more}"


def _fault_lane(
    drawing: Drawing, scale: Scale, track: Track, spans: Sequence[Span], instants: Sequence[Instant]
) -> _Lane:
    columns: dict[float, int] = {}
    for at_ns in (*(span.start_ns for span in spans), *(each.at_ns for each in instants)):
        x = round(scale.x(at_ns) * 2) / 2
        columns[x] = columns.get(x, 0) + 1

    def paint(top: float) -> None:
        bottom = top + _FAULTS_HEIGHT
        most = max(columns.values())
        teeth = [
            (x, bottom - 8 - (_FAULTS_HEIGHT - 8) * count / most, bottom) for x, count in columns.items()
        ]
        drawing.combs(teeth, f"tick {track.value}", f"{len(spans):,} page faults")

    return _Lane(name=track.value, height=_FAULTS_HEIGHT, paint=paint)


def _counter_lane(drawing: Drawing, scale: Scale, values: Sequence[Counter], freeze: Span | None) -> _Lane:
    def paint(top: float) -> None:
        bottom = top + _COUNTER_HEIGHT - 4
        most = max(1, *(each.value for each in values))
        points: list[tuple[float, float]] = []
        for each in values:
            x = scale.x(each.at_ns)
            y = bottom - (_COUNTER_HEIGHT - 22) * max(0.0, each.value / most)
            points += [(x, points[-1][1]), (x, y)] if points else [(x, y)]
        # A value holds until the next, but nobody counts once the program is frozen.
        if freeze is not None and freeze.start_ns > values[-1].at_ns:
            points.append((scale.x(freeze.start_ns), points[-1][1]))
        drawing.path(points, "step")
        _values(drawing, [(scale.x(each.at_ns), each.value) for each in values], most, bottom)

    return _Lane(name=values[0].name, height=_COUNTER_HEIGHT, paint=paint)


def _values(
    drawing: Drawing, values: Sequence[tuple[float, int | float]], most: float, bottom: float
) -> None:
    """Write the numbers over the steps, those that have room."""
    until = 0.0
    for x, value in values:
        label = f"{value:,}" if isinstance(value, int) and value < 10**12 else f"{value:g}"
        room = svg.width_px(label)
        left = min(x + 3, _RIGHT - room)
        if left > until:
            y = bottom - (_COUNTER_HEIGHT - 22) * max(0.0, value / most)
            drawing.text(left, y - 5, label, "number")
            until = left + room + 4


# --- The page


_PAGE_STYLE: Final = (
    ":root{color-scheme:light dark}body{margin:0 auto;max-width:1200px;padding:0 1rem 3rem;"
    "font:14px/1.5 system-ui,'DejaVu Sans',sans-serif;background:#fff;color:#1f2328}"
    "svg{width:100%;height:auto}table{border-collapse:collapse;margin:1rem 20px}"
    "caption{text-align:left;font-weight:600}td,th{padding:.15rem 1rem .15rem 0;text-align:left;"
    "border-bottom:1px solid #d8dee4}td+td+td{text-align:right;font-variant-numeric:tabular-nums}"
    "@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}td,th{border-color:#30363d}}"
)


def page(recording: Recording) -> str:
    """Return an HTML page with the picture and its numbers. It has no script and loads nothing."""
    summary = timesummary.summarise(recording)
    steps = [(each.name, each.track, f"{each.start_ms:.3f}", f"{each.ms:.3f}") for each in summary.steps]
    rounds = [
        (f"{each.number}", "source", f"{each.ms:.3f}", f"{each.sent_pages:,}", f"{each.dirty_pages:,}")
        for each in summary.rounds
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{svg.escaped(headline(summary))}</title><style>{_PAGE_STYLE}</style></head><body>",
        draw(recording),
        _table("Steps inside the freeze", ("step", "at", "began, ms", "took, ms"), steps),
        _table("Rounds", ("round", "at", "took, ms", "pages sent", "dirty at its end"), rounds),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{svg.escaped(cell)}</th>" for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{svg.escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows[:1000]
    )
    return f"<table><caption>{caption}</caption><tr>{head}</tr>\n{body}</table>"
