from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import RequestError
from godwit.migrate import tracefile
from godwit.migrate.recording import DIRTY_PAGES, FAULT, FREEZE, ROUND, Arg, Recording, Span, Track
from godwit.migrate.timeline import DISABLED, Timeline, read
from godwit.migrate.timesummary import percentile, summarise

MS = 1_000_000
START = 7_000 * MS


def a_move() -> Timeline:
    """Two rounds, a freeze of 5 ms with three steps, two faults; noted in the order of their ends."""
    timeline = Timeline("m-1", "precopy")
    timeline.round(1, START, START + 30 * MS, sent_pages=1000, dirty_pages=90)
    timeline.round(2, START + 30 * MS, START + 40 * MS, sent_pages=90, dirty_pages=7)
    frozen = START + 50 * MS
    timeline.span("registers", Track.SOURCE, frozen + MS, frozen + 2 * MS)
    timeline.span("capture", Track.SOURCE, frozen + MS, frozen + 3 * MS, pages=7)
    timeline.add_remote("build", MS // 2, 2 * MS, frozen + 2 * MS, files=3)
    timeline.instant("GO", Track.SOURCE, frozen + 4 * MS)
    timeline.frozen(frozen, frozen + 5 * MS)
    timeline.fault(frozen + 6 * MS, frozen + 7 * MS, 0x7F00_0000_1000, 8)
    timeline.fault(frozen + 6 * MS + 1000, frozen + 9 * MS + 1000, 0x7F00_0000_9000)
    timeline.span("move", Track.SOURCE, START, frozen + 10 * MS)
    return timeline


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [each for each in json.loads(path.read_text())["traceEvents"] if each["ph"] == kind]


def span(start_ns: int, end_ns: int, name: str = "x", track: Track = Track.SOURCE) -> Span:
    return Span(name=name, track=track, start_ns=start_ns, end_ns=end_ns)


# --- Noting


def test_what_was_noted_is_in_order_and_the_outer_first() -> None:
    names = [each.name for each in a_move().recording().spans]
    assert names == ["move", ROUND, ROUND, FREEZE, "capture", "registers", "build", FAULT, FAULT]


def test_of_spans_that_agree_in_both_ends_the_outer_block_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.monotonic_ns", lambda: 5)
    timeline = Timeline()
    with timeline.during("outer", Track.SOURCE), timeline.during("inner", Track.SOURCE, depth=1):
        pass
    assert [each.name for each in timeline.recording().spans] == ["outer", "inner"]


def test_a_block_that_is_left_by_an_error_is_noted() -> None:
    timeline = Timeline()
    before = timeline.now()
    with pytest.raises(KeyError), timeline.during("tried", Track.SOURCE, attempt=2):
        raise KeyError
    (noted,) = timeline.recording().spans
    assert (noted.name, noted.args) == ("tried", {"attempt": 2})
    assert before <= noted.start_ns <= noted.end_ns <= timeline.now()


def test_a_round_is_a_span_and_a_value_of_the_dirty_pages() -> None:
    recording = a_move().recording()
    assert [(each.name, each.at_ns - START, each.value) for each in recording.counters] == [
        (DIRTY_PAGES, 30 * MS, 90),
        (DIRTY_PAGES, 40 * MS, 7),
    ]


def test_times_of_another_machine_are_put_on_our_clock() -> None:
    timeline = Timeline()
    timeline.add_remote("build", -20, 50, 1000)
    (noted,) = timeline.recording().spans
    assert (noted.track, noted.start_ns, noted.end_ns) == (Track.DESTINATION, 980, 1030)


@pytest.mark.parametrize(("start_ns", "duration_ns"), [(1 << 51, 1), (-(1 << 51), 1), (0, -1), (0, 1 << 51)])
def test_times_of_another_machine_that_cannot_be_are_dropped(start_ns: int, duration_ns: int) -> None:
    timeline = Timeline()
    timeline.add_remote("lie", start_ns, duration_ns, START)
    assert (timeline.recording().spans, timeline.dropped) == ((), 1)


def test_a_span_never_ends_before_it_starts() -> None:
    timeline = Timeline()
    timeline.span("back", Track.SOURCE, 100, 90)
    assert timeline.recording().spans[0].duration_ns == 0


def test_a_full_timeline_counts_what_it_drops_and_faults_leave_room_for_the_story() -> None:
    timeline = Timeline(limit=100)
    for number in range(1000):
        timeline.fault(number, number + 1, 0)
    timeline.span("commit", Track.SOURCE, 5000, 5001)
    for number in range(50):
        timeline.instant("moment", Track.SOURCE, number)
        timeline.counter("value", Track.SOURCE, number, number)
        timeline.span("step", Track.SOURCE, number, number)
    recording = timeline.recording()
    kept = len(recording.spans) + len(recording.instants) + len(recording.counters)
    assert kept <= 100
    assert kept + recording.dropped == 1000 + 1 + 150
    assert "commit" in {each.name for each in recording.spans}


def test_a_disabled_timeline_takes_every_call_and_keeps_nothing(tmp_path: Path) -> None:
    DISABLED.round(1, 0, 1, sent_pages=1, dirty_pages=1)
    DISABLED.span("x", Track.SOURCE, 0, 1)
    DISABLED.add_remote("x", 0, 1, 0)
    DISABLED.instant("x", Track.SOURCE, 0)
    DISABLED.counter("x", Track.SOURCE, 0, 1)
    DISABLED.frozen(0, 1)
    DISABLED.fault(0, 1, 0)
    with DISABLED.during("x", Track.SOURCE), DISABLED.during("y", Track.SOURCE):
        pass
    DISABLED.write(tmp_path / "trace.json")
    assert DISABLED.now() == 0
    assert DISABLED.recording() == Recording(migration="", strategy="")
    assert list(tmp_path.iterdir()) == []


def test_a_disabled_timeline_has_its_own_of_every_method_that_notes() -> None:
    # `frozen` notes by `span`; whatever is new and forgotten here would keep events for ever.
    inherited = {"frozen", "recording"}
    names = {name for name, value in vars(Timeline).items() if callable(value) and not name.startswith("_")}
    assert names - vars(type(DISABLED)).keys() == inherited


# --- The file


def test_a_file_is_what_viewers_of_chrome_traces_want(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    a_move().write(path)
    whole = json.loads(path.read_text())
    assert whole["displayTimeUnit"] == "ms"
    assert whole["otherData"]["migration"] == "m-1"
    assert whole["otherData"]["strategy"] == "precopy"
    assert whole["otherData"]["origin_ns"] == START
    capture = next(each for each in events(path, "X") if each["name"] == "capture")
    assert (capture["ts"], capture["dur"], capture["args"]) == (51_000.0, 2_000.0, {"pages": 7})
    fault = next(each for each in events(path, "X") if each["name"] == FAULT)
    assert fault["args"] == {"address": "0x7f0000001000", "pages": 8}
    (moment,) = events(path, "i")
    assert (moment["name"], moment["ts"], moment["s"]) == ("GO", 54_000.0, "t")
    assert [each["args"] for each in events(path, "C")] == [{"value": 90}, {"value": 7}]


def test_every_track_and_lane_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    a_move().write(path)
    names = {
        (each["pid"], each["tid"]): each["args"]["name"]
        for each in events(path, "M")
        if each["name"] == "thread_name"
    }
    assert {names[each["pid"], each["tid"]] for each in events(path, "X")} == {
        "program",
        "source",
        "destination",
        "faults",
        "faults 2",
    }
    assert {each["args"]["name"] for each in events(path, "M") if each["name"] == "process_name"} == set(
        Track
    )


def test_what_overlaps_without_nesting_gets_a_lane_of_its_own() -> None:
    spans = [span(0, 100), span(0, 50), span(10, 20), span(40, 90), span(95, 100), span(100, 130)]
    assert [lane for lane, _ in tracefile.lanes(spans)] == [1, 1, 1, 2, 1, 1]


def test_tracks_have_lanes_of_their_own() -> None:
    spans = [span(0, 100), span(50, 150, track=Track.DESTINATION)]
    assert [lane for lane, _ in tracefile.lanes(spans)] == [1, 1]


def test_a_file_read_back_is_what_was_noted(tmp_path: Path) -> None:
    timeline = a_move()
    timeline.dropped = 3
    timeline.write(tmp_path / "trace.json")
    assert read(tmp_path / "trace.json") == timeline.recording()


def test_names_and_values_that_json_lacks_can_be_written(tmp_path: Path) -> None:
    timeline = Timeline("\udcff", "b\udcfe")
    args: dict[str, Arg] = {
        "\udcff": "\udcff",
        "inf": float("inf"),
        "nan": float("nan"),
        "big": 1 << 70,
        "yes": True,
    }
    timeline.span("file \udcff", Track.SOURCE, 0, 1, **args)
    timeline.write(tmp_path / "trace.json")
    (found,) = read(tmp_path / "trace.json").spans
    assert found.name == "file \\udcff"
    assert found.args == {
        "\\udcff": "\\udcff",
        "inf": "inf",
        "nan": "nan",
        "big": str(1 << 70),
        "yes": 1,
    }


def damaged(path: Path, **changes: object) -> None:
    """Write a trace whose first span has these fields."""
    a_move().write(path)
    whole = json.loads(path.read_text())
    first = next(each for each in whole["traceEvents"] if each["ph"] == "X")
    first.update(changes)
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ts", -1),
        ("ts", "0"),
        ("ts", 1e30),
        ("ts", float("nan")),
        ("dur", -1),
        ("dur", 1e30),
        ("cat", "kernel"),
        ("ph", "Q"),
        ("name", 5),
        ("name", None),
        ("args", {"a": [1]}),
        ("args", {"a": None}),
        ("args", [1]),
    ],
)
def test_a_field_that_cannot_be_is_refused(tmp_path: Path, field: str, value: object) -> None:
    damaged(tmp_path / "trace.json", **{field: value})
    with pytest.raises(RequestError, match="is no timeline of a move"):
        read(tmp_path / "trace.json")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"traceEvents": []}',
        b'{"traceEvents": [], "otherData": {}}',
        b'{"traceEvents": 5, "otherData": {"format": 1, "godwit": "", "migration": "", "strategy": ""}}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"otherData": ' + b'{"a":' * 100_000,
    ],
)
def test_a_file_that_is_no_timeline_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "trace.json").write_bytes(raw)
    with pytest.raises(RequestError, match="is no timeline of a move"):
        read(tmp_path / "trace.json")


def test_a_file_of_a_later_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    a_move().write(path)
    path.write_text(path.read_text().replace('"format":1,"godwit":"', '"format":9,"godwit":"7.'))
    with pytest.raises(RequestError, match=r"format 9, written by 7\..*; this is 1"):
        read(path)


def test_a_file_that_is_too_large_is_not_taken_in(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RequestError, match="more than 128 MiB"):
        read(path)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_cannot_be_read_is_a_wrong_request(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        read(tmp_path / name)


# --- Its numbers


def test_the_summary_has_the_freeze_and_its_steps() -> None:
    summary = summarise(a_move().recording())
    assert (summary.total_ms, summary.freeze_ms) == (60.0, 5.0)
    assert [(each.name, each.track, each.depth, each.start_ms, each.ms) for each in summary.steps] == [
        ("capture", "source", 0, 1.0, 2.0),
        ("registers", "source", 1, 1.0, 1.0),
        ("build", "destination", 0, 2.5, 2.0),
    ]
    assert summary.unnoted_ms == 1.5


def test_the_summary_has_rounds_and_faults() -> None:
    summary = summarise(a_move().recording())
    assert [(each.number, each.ms, each.sent_pages, each.dirty_pages) for each in summary.rounds] == [
        (1, 30.0, 1000, 90),
        (2, 10.0, 90, 7),
    ]
    faults = summary.faults
    assert (faults.count, faults.median_ms, faults.p99_ms, faults.max_ms) == (2, 1.0, 3.0, 3.0)


def test_only_the_part_of_a_step_that_lies_inside_the_freeze_counts() -> None:
    timeline = Timeline()
    timeline.frozen(10 * MS, 20 * MS)
    timeline.span("early", Track.SOURCE, 5 * MS, 12 * MS)
    timeline.span("late", Track.SOURCE, 18 * MS, 30 * MS)
    timeline.span("before", Track.SOURCE, 0, 10 * MS)
    timeline.span("after", Track.SOURCE, 20 * MS, 21 * MS)
    steps = summarise(timeline.recording()).steps
    assert [(each.name, each.start_ms, each.ms) for each in steps] == [("early", 0, 2), ("late", 8, 2)]


def test_of_several_freezes_the_last_counts() -> None:
    timeline = Timeline()
    timeline.frozen(10 * MS, 18 * MS)
    timeline.frozen(30 * MS, 33 * MS)
    assert summarise(timeline.recording()).freeze_ms == 3.0


def test_an_empty_timeline_has_a_summary() -> None:
    summary = summarise(Timeline().recording())
    assert (summary.total_ms, summary.freeze_ms, summary.steps, summary.faults.count) == (0.0, None, (), 0)


@pytest.mark.parametrize(("percent", "wanted"), [(50, 50), (99, 99), (100, 100), (0, 1), (1, 1)])
def test_a_percentile_is_a_value_that_was_there(percent: int, wanted: int) -> None:
    assert percentile(range(1, 101), percent) == wanted
    assert percentile([], percent) == 0
