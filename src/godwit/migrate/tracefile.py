"""A recording as a file, in the Trace Event Format that Perfetto and chrome://tracing open.

Each track is a "process" there, and its lanes are the "threads": the viewers nest by time what shares
a thread, so spans that overlap without nesting need several. Microseconds are counted from the first
event on, as decimal numbers; `otherData.origin_ns` says when that was, so that no digit is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from godwit import __version__
from godwit.errors import RequestError
from godwit.migrate.recording import Arg, Counter, Instant, Recording, Span, Track

FORMAT: Final = 1

# A full timeline has some 30 MB.
_MAX_FILE_BYTES: Final = 128 << 20
_MAX_LANES: Final = 64

_PROCESS: Final = {track: number for number, track in enumerate(Track, 1)}

_Us = Annotated[float, msgspec.Meta(ge=0, le=1 << 53)]
_Ns = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class _Event(msgspec.Struct, tag_field="ph", frozen=True, kw_only=True):
    name: str
    pid: int = 0
    tid: int = 0


class _Complete(_Event, tag="X", frozen=True):
    cat: Track
    ts: _Us
    dur: _Us
    args: dict[str, Arg] = {}


class _Instant(_Event, tag="i", frozen=True):
    cat: Track
    ts: _Us
    s: str = "t"
    args: dict[str, Arg] = {}


class _Value(msgspec.Struct, frozen=True, kw_only=True):
    value: int | float


class _Counter(_Event, tag="C", frozen=True):
    cat: Track
    ts: _Us
    args: _Value


class _Metadata(_Event, tag="M", frozen=True):
    args: dict[str, Arg]


class _Other(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    godwit: str
    migration: str
    strategy: str
    origin_ns: _Ns
    dropped: _Count = 0


class _Trace(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    # First, so that the start of a file tells what it is.
    other_data: _Other
    display_time_unit: str = "ms"
    trace_events: list[_Complete | _Instant | _Counter | _Metadata]


def encode(recording: Recording) -> bytes:
    """Return the file of a recording."""
    origin_ns = recording.start_ns
    laned = list(lanes(recording.spans))
    events: list[Any] = list(_names(laned))
    events += [
        _Complete(
            name=_text(span.name),
            cat=span.track,
            pid=_PROCESS[span.track],
            tid=lane,
            ts=(span.start_ns - origin_ns) / 1000,
            dur=span.duration_ns / 1000,
            args=_plain(span.args),
        )
        for lane, span in laned
    ]
    events += [
        _Instant(
            name=_text(each.name),
            cat=each.track,
            pid=_PROCESS[each.track],
            tid=1,
            ts=(each.at_ns - origin_ns) / 1000,
            args=_plain(each.args),
        )
        for each in recording.instants
    ]
    events += [
        _Counter(
            name=_text(each.name),
            cat=each.track,
            pid=_PROCESS[each.track],
            ts=(each.at_ns - origin_ns) / 1000,
            args=_Value(value=each.value),
        )
        for each in recording.counters
    ]
    other = _Other(
        format=FORMAT,
        godwit=__version__,
        migration=_text(recording.migration),
        strategy=_text(recording.strategy),
        origin_ns=origin_ns,
        dropped=recording.dropped,
    )
    return msgspec.json.encode(_Trace(other_data=other, trace_events=events)) + b"\n"


def lanes(spans: Iterable[Span]) -> Iterator[tuple[int, Span]]:
    """Give each span the first lane of its track, from 1 up, in which it is inside or apart from others.

    Args:
        spans: In order of time, the outer first. When there are too many lanes the last takes the rest.
    """
    ends: dict[Track, list[list[int]]] = {track: [] for track in Track}
    for span in spans:
        found = ends[span.track]
        for lane, open_ends in enumerate(found, 1):
            while open_ends and open_ends[-1] <= span.start_ns:
                open_ends.pop()
            if not open_ends or span.end_ns <= open_ends[-1] or lane == _MAX_LANES:
                open_ends.append(span.end_ns)
                yield lane, span
                break
        else:
            found.append([span.end_ns])
            yield len(found), span


def _names(laned: Iterable[tuple[int, Span]]) -> Iterator[_Metadata]:
    used = {(span.track, lane) for lane, span in laned}
    for track, number in _PROCESS.items():
        yield _Metadata(name="process_name", pid=number, args={"name": track.value})
        yield _Metadata(name="process_sort_index", pid=number, args={"sort_index": number})
        for lane in sorted({1, *(lane for each, lane in used if each is track)}):
            name = track.value if lane == 1 else f"{track.value} {lane}"
            yield _Metadata(name="thread_name", pid=number, tid=lane, args={"name": name})


def _text(text: str) -> str:
    """Return the text as it can be encoded: a file's name may have bytes that are no UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _plain(args: dict[str, Arg]) -> dict[str, Arg]:
    return {_text(key): _plain_value(value) for key, value in args.items()}


def _plain_value(value: Arg) -> Arg:
    """Return a value that JSON has; what it lacks becomes a string."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return int(value) if -(1 << 63) <= value < 1 << 64 else str(value)
    return value if math.isfinite(value) else str(value)


_DECODER: Final = msgspec.json.Decoder(_Trace)


def read(path: Path) -> Recording:
    """Read the timeline of a move from a file, whoever wrote it.

    Raises:
        RequestError: It cannot be read, or is no timeline that this Godwit knows.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}", remedy="name another file") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise RequestError(f"{path} is no timeline of a move: it has more than {_MAX_FILE_BYTES >> 20} MiB")
    try:
        trace = _DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{path} is no timeline of a move: {error}") from None
    if trace.other_data.format != FORMAT:
        raise RequestError(
            f"{path} has format {trace.other_data.format}, written by {trace.other_data.godwit};"
            f" this is {FORMAT}",
            remedy="take the Godwit that wrote it",
        )
    return _recording(trace)


def _recording(trace: _Trace) -> Recording:
    origin_ns = trace.other_data.origin_ns
    spans: list[Span] = []
    instants: list[Instant] = []
    counters: list[Counter] = []
    for each in trace.trace_events:
        if isinstance(each, _Metadata):
            continue
        at_ns = origin_ns + round(each.ts * 1000)
        if isinstance(each, _Complete):
            end_ns = at_ns + round(each.dur * 1000)
            span = Span(name=each.name, track=each.cat, start_ns=at_ns, end_ns=end_ns, args=each.args)
            spans.append(span)
        elif isinstance(each, _Instant):
            instants.append(Instant(name=each.name, track=each.cat, at_ns=at_ns, args=each.args))
        else:
            counters.append(Counter(name=each.name, track=each.cat, at_ns=at_ns, value=each.args.value))
    # Whoever wrote it need not have kept the order.
    return Recording(
        migration=trace.other_data.migration,
        strategy=trace.other_data.strategy,
        spans=tuple(sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))),
        instants=tuple(sorted(instants, key=lambda each: each.at_ns)),
        counters=tuple(sorted(counters, key=lambda each: each.at_ns)),
        dropped=trace.other_data.dropped,
    )
