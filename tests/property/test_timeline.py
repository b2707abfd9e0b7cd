"""A timeline read back is the one that was written, and no file makes reading or drawing fail otherwise."""

from __future__ import annotations

import contextlib
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.cli import timeplot
from godwit.errors import RequestError
from godwit.migrate import timesummary, tracefile
from godwit.migrate.recording import DIRTY_PAGES, FAULT, FREEZE, ROUND, Track
from godwit.migrate.timeline import Timeline, read

on_one_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

# What UTF-8 has; the rest is written escaped.
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [FREEZE, ROUND, DIRTY_PAGES, FAULT, "</text><script>", '"><!--', "&amp;", "]]>"]
)
tracks = st.sampled_from(Track)
origins = st.integers(min_value=0, max_value=1 << 61)
# Fourteen days after the first event a microsecond still has three digits.
moments = st.integers(min_value=0, max_value=1000) | st.integers(min_value=0, max_value=1 << 49)
integers = st.integers(min_value=-(1 << 63), max_value=(1 << 63) - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
arguments = st.dictionaries(words, integers | finite | words, max_size=3)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    timeline = Timeline(draw(words), draw(words))
    origin = draw(origins)
    for _ in range(draw(st.integers(min_value=0, max_value=12))):
        name, track, args = draw(words), draw(tracks), draw(arguments)
        start = origin + draw(moments)
        match draw(st.integers(min_value=0, max_value=4)):
            case 0:
                timeline.span(name, track, start, start + draw(moments), **args)
            case 1:
                timeline.instant(name, track, start, **args)
            case 2:
                timeline.counter(name, track, start, draw(integers | finite))
            case 3:
                timeline.fault(start, start + draw(moments), draw(st.integers(0, 1 << 63)))
            case _:
                timeline.round(draw(st.integers(0, 99)), start, start + 5, sent_pages=1, dirty_pages=2)
    return timeline


@given(timeline=timelines())
@on_one_directory
def test_a_timeline_comes_back_as_it_was_noted(timeline: Timeline, tmp_path: Path) -> None:
    timeline.write(tmp_path / "trace.json")
    assert read(tmp_path / "trace.json") == timeline.recording()


@given(timeline=timelines())
def test_spans_in_one_lane_are_inside_or_apart(timeline: Timeline) -> None:
    laned = list(tracefile.lanes(timeline.recording().spans))
    for at, (lane, span) in enumerate(laned):
        for other_lane, other in laned[:at]:
            if (other_lane, other.track) == (lane, span.track):
                apart = other.end_ns <= span.start_ns
                inside = other.start_ns <= span.start_ns and span.end_ns <= other.end_ns
                assert apart or inside


@given(timeline=timelines())
def test_rows_of_the_picture_never_overlap(timeline: Timeline) -> None:
    for track in Track:
        rows = timeplot.packed([span for span in timeline.recording().spans if span.track is track])
        for at, (row, span) in enumerate(rows):
            assert all(other.end_ns <= span.start_ns for below, other in rows[:at] if below == row)


@given(timeline=timelines())
@settings(deadline=None)
def test_every_timeline_is_drawn_as_well_formed_xml_without_a_script(timeline: Timeline) -> None:
    root = ET.fromstring(timeplot.draw(timeline.recording()))
    kinds = {element.tag.partition("}")[2] for element in root.iter()}
    assert kinds <= {"svg", "title", "style", "rect", "line", "path", "text"}
    assert "<script" not in timeplot.page(timeline.recording())
    assert "nan" not in "".join(
        value for element in root.iter("{*}rect") for value in element.attrib.values()
    )


@given(
    freeze_ns=st.integers(0, 1000),
    spans=st.lists(st.tuples(tracks, st.integers(0, 1500), st.integers(0, 1500)), max_size=8),
)
def test_steps_lie_inside_the_freeze(freeze_ns: int, spans: list[tuple[Track, int, int]]) -> None:
    timeline = Timeline()
    timeline.frozen(500, 500 + freeze_ns)
    for track, start_ns, length_ns in spans:
        timeline.span("step", track, start_ns, start_ns + length_ns)
    summary = timesummary.summarise(timeline.recording())
    assert summary.freeze_ms == freeze_ns / 1e6
    assert 0.0 <= summary.unnoted_ms <= summary.freeze_ms
    for step in summary.steps:
        assert step.start_ms >= 0
        assert 0 <= step.ms <= summary.freeze_ms - step.start_ms + 1e-9


@given(timeline=timelines(), data=st.data())
@on_one_directory
def test_a_damaged_file_is_refused_or_drawn(timeline: Timeline, data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline.write(path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(RequestError):
        ET.fromstring(timeplot.draw(read(path)))


@pytest.mark.parametrize("name", [FREEZE, ROUND, DIRTY_PAGES, FAULT, "x"])
@given(value=st.recursive(st.none() | st.booleans() | finite | integers | words, st.lists, max_leaves=3))
@on_one_directory
def test_a_hostile_value_is_refused_or_drawn(name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    Timeline().write(path)
    whole = json.loads(path.read_text())
    for kind, track in (("X", "program"), ("X", "source"), ("X", "faults"), ("C", "source"), ("i", "source")):
        event = {"ph": kind, "name": name, "cat": track, "ts": 1, "dur": 2}
        for field in ("ts", "dur", "args"):
            changed = {**event, field: {"number": value, "value": value} if field == "args" else value}
            path.write_text(json.dumps({**whole, "traceEvents": [event | {"args": {"value": 1}}, changed]}))
            with contextlib.suppress(RequestError):
                ET.fromstring(timeplot.draw(read(path)))
