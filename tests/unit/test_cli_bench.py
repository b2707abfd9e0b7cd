from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from godwit.cli import svg, timepanels, timeplot
from godwit.cli.main import main
from godwit.migrate.recording import Track
from godwit.migrate.timeline import Timeline
from tests.unit.faces import Run

MS = 1_000_000
SVG = "{http://www.w3.org/2000/svg}"
EVIL = '</text><script>alert("1")</script>\x1b]0;\x07'


def a_move(name: str = "capture", steps: int = 8) -> Timeline:
    """Five rounds, a freeze with steps of which two lie at the destination, 300 page faults."""
    timeline = Timeline("m-1", "precopy")
    now = 10**12
    for number in range(1, 6):
        timeline.round(number, now, now + 20 * MS, sent_pages=6000 // number, dirty_pages=5000 // number)
        now += 20 * MS
    frozen = now
    for number in range(steps):
        timeline.span(f"{name} {number}", Track.SOURCE, now, now + MS // 2, bytes=number)
        now += MS // 2
    timeline.add_remote("build", MS, MS // 4, frozen)
    timeline.instant("decided", Track.SOURCE, frozen + MS)
    timeline.frozen(frozen, now)
    for number in range(300):
        timeline.fault(now, now + (number + 1) * 1000, number << 12)
        now += MS // 3
    return timeline


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "move.json"
    a_move().write(path)
    return path


def words_of(picture: str) -> list[str]:
    return [each.text or "" for each in ET.fromstring(picture).iter(f"{SVG}text")]


# --- The command


def test_plot_draws_beside_the_file_and_says_the_numbers(run: Run, trace: Path) -> None:
    shown = run("bench", "plot", str(trace))
    assert (shown.status, shown.err) == (0, "")
    for words in ("4.000 ms", "capture 7", "build", "round 5", "1,200 pages sent", "1,000 dirty"):
        assert words in shown.out
    assert "300, median 0.150 ms, p99 0.297 ms" in shown.out
    page = (trace.parent / "move.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<svg " in page
    assert sorted(os.listdir(trace.parent)) == ["move.html", "move.json"]


def test_plot_prints_the_numbers_as_json(run: Run, trace: Path) -> None:
    told = run("bench", "plot", str(trace), "--json").json
    wanted = "migration strategy total_ms freeze_ms steps unnoted_ms rounds faults dropped output"
    assert told.keys() == set(wanted.split())
    assert (told["migration"], told["freeze_ms"], told["unnoted_ms"]) == ("m-1", 4.0, 0.0)
    assert told["steps"][3] == {
        "name": "build",
        "track": "destination",
        "depth": 0,
        "start_ms": 1.0,
        "ms": 0.25,
    }
    assert told["rounds"][0] == {"number": 1, "ms": 20.0, "sent_pages": 6000, "dirty_pages": 5000}
    assert told["faults"] == {"count": 300, "median_ms": 0.15, "p99_ms": 0.297, "max_ms": 0.3}
    assert told["output"] == str(trace.with_suffix(".html"))


def test_plot_draws_where_it_is_told_and_is_quiet(run: Run, trace: Path) -> None:
    shown = run("bench", "plot", str(trace), "--output", str(trace.parent / "it.svg"), "-q")
    assert (shown.status, shown.out, shown.err) == (0, "", "")
    assert ET.parse(trace.parent / "it.svg").getroot().tag == f"{SVG}svg"
    assert not (trace.parent / "move.html").exists()


@pytest.mark.parametrize("name", ["it.png", "it", "it.svg/", "missing/it.svg", ".."])
def test_a_picture_that_cannot_be_is_a_wrong_request(run: Run, trace: Path, name: str) -> None:
    (trace.parent / "it.svg").mkdir()
    shown = run("bench", "plot", str(trace), "--output", f"{trace.parent}/{name}", "--json")
    assert shown.status == 2
    assert shown.json["error"]["class"] == "RequestError"
    assert sorted(os.listdir(trace.parent)) == ["it.svg", "move.json"]


def test_the_timeline_itself_is_never_drawn_over(run: Run, tmp_path: Path) -> None:
    a_move().write(tmp_path / "move.html")
    kept = (tmp_path / "move.html").read_bytes()
    assert run("bench", "plot", str(tmp_path / "move.html")).status == 2
    assert (tmp_path / "move.html").read_bytes() == kept


def test_what_is_no_timeline_is_refused_in_one_line_and_nothing_is_drawn(run: Run, tmp_path: Path) -> None:
    (tmp_path / "move.json").write_text('{"traceEvents": [{"ph": "\x1b[2J"}]}')
    shown = run("bench", "plot", str(tmp_path / "move.json"))
    assert (shown.status, shown.out) == (2, "")
    assert re.fullmatch(r"godwit: error: [^\n]*is no timeline of a move[^\n]*\n", shown.err)
    assert "\x1b" not in shown.err
    assert os.listdir(tmp_path) == ["move.json"]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_name_in_a_timeline_cannot_move_the_cursor(
    run: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    a_move(EVIL).write(tmp_path / "move.json")
    shown = run("bench", "plot", str(tmp_path / "move.json"), *options)
    assert shown.status == 0
    assert "\x1b" not in shown.out
    assert "\\u001b" not in shown.out


def test_plot_shows_its_examples(run: Run) -> None:
    shown = run("bench", "plot", "--help")
    assert shown.status == 0
    assert "Examples:" in shown.out


def test_the_subcommand_is_completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_GODWIT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "godwit bench p")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "plain,plot\n"


def test_every_field_of_the_numbers_is_explained(run: Run, trace: Path) -> None:
    page = Path(__file__).parents[2].joinpath("docs/formats/json.md").read_text()
    section = page.partition("## bench plot")[2].partition("\n## ")[0]
    told = run("bench", "plot", str(trace), "--json").json
    inner = (told["steps"][0], told["rounds"][0], told["faults"])
    names = [*told, *(name for each in inner for name in each)]
    assert [name for name in names if f"`{name}`" not in section and f'"{name}"' not in section] == []


# --- The picture


def test_the_picture_shows_every_step_of_the_freeze_with_its_ms() -> None:
    words = words_of(timeplot.draw(a_move().recording()))
    assert {f"capture {number}" for number in range(8)} <= set(words)
    assert words.count("0.500 ms") == 8
    assert {"0.250 ms", "build", "decided", "The freeze: 4.000 ms"} <= set(words)


def test_the_picture_shows_rounds_and_their_dirty_pages() -> None:
    words = words_of(timeplot.draw(a_move().recording()))
    assert {"5,000", "2,500", "1,666", "dirty pages", "round 1"} <= set(words)


def test_the_picture_has_the_faults_only_where_there_are_some() -> None:
    assert "Page faults: 300" in words_of(timeplot.draw(a_move().recording()))
    timeline = Timeline("m-1", "stopcopy")
    timeline.frozen(0, MS)
    assert not any("fault" in each for each in words_of(timeplot.draw(timeline.recording())))


def test_a_move_that_never_froze_is_drawn_without_a_close_up() -> None:
    words = words_of(timeplot.draw(Timeline("m-1", "precopy").recording()))
    assert "A move that never froze its program" in words
    assert not any(each.startswith("The freeze") for each in words)


def test_of_many_steps_the_longest_are_shown_and_the_others_counted() -> None:
    timeline = a_move(steps=60)
    words = words_of(timeplot.draw(timeline.recording()))
    assert sum(each.startswith("capture") for each in words) == 40
    assert any("21 shorter steps not shown, 10.250 ms" in each for each in words)


def test_a_picture_of_very_many_events_stays_small() -> None:
    timeline = Timeline()
    for number in range(15_000):
        timeline.span("step", Track.SOURCE, number * 10, number * 10 + 5)
        timeline.instant("moment", Track.SOURCE, number)
        timeline.counter(f"c{number}", Track.SOURCE, number, number)
    for number in range(100_000):
        timeline.fault(number * 10, number * 10 + 5, number)
    assert len(timeplot.draw(timeline.recording())) < 600_000


def test_hostile_names_are_words_and_nothing_else() -> None:
    recording = a_move(EVIL).recording()
    picture, page = timeplot.draw(recording), timeplot.page(recording)
    assert "<script" not in picture + page
    assert "\x1b" not in picture + page
    assert {each.tag for each in ET.fromstring(picture).iter()} <= {
        f"{SVG}{name}" for name in "svg title style rect line path text".split()
    }


def test_a_page_loads_nothing_and_is_readable_in_the_dark() -> None:
    page = timeplot.page(a_move().recording())
    assert "default-src 'none'" in page
    assert page.count("prefers-color-scheme:dark") == 2
    assert not re.search(r"(?:src|href)=|url\(", page)


def boxes(picture: str) -> list[tuple[str, float, float, float]]:
    """Return every small label of a picture: words, left, right, base."""
    found: list[tuple[str, float, float, float]] = []
    for each in ET.fromstring(picture).iter(f"{SVG}text"):
        if each.get("class") in ("title", "head"):
            continue
        x, y, words = float(each.attrib["x"]), float(each.attrib["y"]), each.text or ""
        width = svg.width_px(words)
        left = {"start": x, "middle": x - width / 2, "end": x - width}[each.attrib["text-anchor"]]
        found.append((words, left, left + width, y))
    return found


@pytest.mark.parametrize("steps", [1, 8, 60])
@pytest.mark.parametrize(("moments", "longest_ns"), [(0, 1), (3, 300 * MS), (40, 10**14)])
def test_no_label_lies_on_another_or_off_the_paper(steps: int, moments: int, longest_ns: int) -> None:
    timeline = a_move("a step with a name that is longer than any column is wide", steps)
    for number in range(moments):
        timeline.instant(f"moment {number}", Track.SOURCE, 10**12 + 100 * MS + number * number * 7000)
    timeline.fault(10**12 + 200 * MS, 10**12 + 200 * MS + longest_ns, 0)
    labels = boxes(timeplot.draw(timeline.recording()))
    assert [each for each in labels if each[1] < 0 or each[2] > timeplot.WIDTH] == []
    overlapping = [
        (one, other)
        for at, one in enumerate(labels)
        for other in labels[:at]
        if abs(one[3] - other[3]) < 9 and one[1] < other[2] and other[1] < one[2]
    ]
    assert overlapping == []


@pytest.mark.parametrize(
    ("words", "room", "shown"),
    [("capture", 100, "capture"), ("capture", 40, "captu…"), ("capture", 20, ""), ("中文中文", 30, "中…")],
)
def test_words_are_cut_to_the_room_there_is(words: str, room: float, shown: str) -> None:
    assert svg.fitting(words, room) == shown
    assert svg.width_px(svg.fitting(words, room)) <= room


@pytest.mark.parametrize(
    ("length_ns", "words"),
    [(0, "0 ns"), (999, "999 ns"), (4_730_000, "4.73 ms"), (186_497, "186 µs"), (12_345_678_900, "12.3 s")],
)
def test_a_length_of_time_has_three_digits_that_count(length_ns: int, words: str) -> None:
    assert svg.duration(length_ns) == words


@pytest.mark.parametrize("value", [0.3, 1, 1.5, 3, 7, 10, 11, 4e9])
def test_ticks_are_round(value: float) -> None:
    found = svg.rounded_up(value)
    assert found >= value
    assert f"{found:e}"[0] in "125"
    assert found == 1 or found < value * 2.5 + 1e-9


def test_every_latency_is_in_its_bin() -> None:
    first, counts = timepanels.bins_of([0, 1, 1000, 1000, 1 << 62])
    assert (first, sum(counts), counts[0], counts[-1]) == (0, 5, 2, 1)
    assert counts[19] == 2  # 724 to 1024 ns
    assert timepanels.bins_of([1] * 3) == (0, [3] + [0] * 15)
