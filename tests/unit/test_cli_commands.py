from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from godwit.errors import NoProcessError
from godwit.migrate.report import ProgressEvent, Report
from godwit.migrate.series import Ended, Image
from godwit.resources.base import Disposition, Finding
from tests.unit.faces import Run, raising

REPORT = Report(
    migration="m-1",
    strategy="stopcopy",
    freeze_ms=12.5,
    total_ms=80.0,
    bytes_sent=3 << 20,
    pages=768,
    rounds=1,
    source="a",
    destination="b",
    pid=17,
    survivor="destination",
    processes=2,
    threads=5,
    steps=(("freeze", 1.5),),
)


def finding(disposition: Disposition, what: str, **words: str) -> Finding:
    return Finding(disposition=disposition, what=what, where=words.pop("where", "pid 12 fd 3"), **words)


def plan(*findings: Finding) -> Callable[..., object]:
    movable = all(each.disposition is not Disposition.REFUSE for each in findings)
    made = SimpleNamespace(pid=12, comm="work", findings=findings, movable=movable)
    return lambda *_, **__: made


# --- check


TABLE = (
    finding(Disposition.MOVE, "pipe", why="both ends"),
    finding(Disposition.REACH, "the log at home", where="pid 12 fd 9"),
    finding(Disposition.REFUSE, "TCP connection", why="not carried yet", remedy="close it"),
    finding(Disposition.REBIND, "/dev/null", where="pid 12 fd 0"),
)


def test_check_shows_what_is_in_the_way_first_and_in_full(run: Run, api: SimpleNamespace) -> None:
    api.inspect = plan(*TABLE)
    shown = run("check", "12", "--to", "b")
    assert shown.status == 3
    assert shown.out.startswith("refuse (1)")
    for words in (
        "TCP connection",
        "the log at home",
        "not carried yet",
        "close it",
        "pipe",
        "/dev/null",
        "cannot move to b",
    ):
        assert words in shown.out
    assert shown.out.index("close it") < shown.out.index("/dev/null") < shown.out.index("pipe")


def test_check_returns_0_when_it_can_move(run: Run, api: SimpleNamespace) -> None:
    api.inspect = plan(TABLE[0], TABLE[3])
    shown = run("check", "12")
    assert shown.status == 0
    assert "can move" in shown.out


def test_check_prints_every_finding_as_json(run: Run, api: SimpleNamespace) -> None:
    api.inspect = plan(*TABLE)
    shown = run("check", "12", "--json")
    assert shown.status == 3
    assert shown.json["pid"] == 12
    assert shown.json["movable"] is False
    assert shown.json["findings"][2] == {
        "disposition": "refuse",
        "what": "TCP connection",
        "where": "pid 12 fd 3",
        "why": "not carried yet",
        "remedy": "close it",
    }


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_file_name_cannot_move_the_cursor(run: Run, api: SimpleNamespace, options: tuple[str, ...]) -> None:
    api.inspect = plan(finding(Disposition.MOVE, "file /tmp/\x1b[2J\nmove (9)\udce4"))
    shown = run("check", "12", *options)
    assert shown.status == 0
    assert "\x1b" not in shown.out
    assert "\nmove (9)" not in shown.out


# --- migrate, checkpoint


def test_migrate_passes_on_what_was_asked_and_prints_the_report(run: Run, api: SimpleNamespace) -> None:
    asked: dict[str, object] = {}

    def move(pid: int, host: str, **words: object) -> Report:
        asked.update(words, pid=pid, host=host)
        return REPORT

    api.migrate = move
    shown = run("migrate", "12", "me@b", "--timeout", "2.5", "--json")
    assert shown.status == 0
    assert (asked["pid"], asked["host"], asked["timeout_s"]) == (12, "me@b", 2.5)
    wanted = "strategy freeze_ms total_ms bytes_sent pages rounds source destination pid survivor"
    wanted += " faults fault_median_us fault_p99_us"
    assert {*wanted.split(), "migration", "processes", "threads", "steps"} == shown.json.keys()
    assert shown.json["steps"] == [["freeze", 1.5]]
    assert shown.err == ""


def move_with_progress(
    pid: int, host: str, *, progress: Callable[[ProgressEvent], None], **_: object
) -> Report:
    for done in range(101):
        progress(ProgressEvent(stage="pages", done_bytes=done << 20, total_bytes=100 << 20))
    progress(ProgressEvent(stage="done"))
    return REPORT


def test_progress_comes_in_few_plain_lines_where_there_is_no_terminal(run: Run, api: SimpleNamespace) -> None:
    api.migrate = move_with_progress
    shown = run("migrate", "12", "b")
    lines = shown.err.splitlines()
    assert lines[0] == "pid 12 to b: memory, 0 B of 100.0 MiB"
    assert lines[-1] == "pid 12 to b: done"
    assert len(lines) == 6
    assert "12.5 ms" in shown.out
    assert "768 pages" in shown.out


@pytest.mark.parametrize("option", ["--json", "-q"])
def test_no_progress_for_programs_and_the_quiet(run: Run, api: SimpleNamespace, option: str) -> None:
    api.migrate = move_with_progress
    assert run("migrate", "12", "b", option).err == ""


def test_checkpoint_passes_on_what_was_asked(run: Run, api: SimpleNamespace, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def write(pid: int, directory: Path, **words: object) -> Report:
        asked.update(words, pid=pid, directory=directory)
        return REPORT

    api.checkpoint = write
    assert run("checkpoint", "12", "--output", str(tmp_path / "nap"), "--leave-running").status == 0
    assert asked["directory"] == tmp_path / "nap"
    assert asked["leave_running"] is True


def one_image(name: str, goes_on_from: str = "") -> Image:
    return Image(image=name, goes_on_from=goes_on_from, report=REPORT)


def test_checkpoint_with_an_interval_tells_of_each_image_and_of_the_end(
    run: Run, api: SimpleNamespace, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}

    def write(pid: int, directory: Path, *, made: Callable[[Image], None], **words: object) -> Ended:
        asked.update(words, pid=pid, directory=directory)
        made(one_image("0001"))
        made(one_image("0002", "0001"))
        return Ended(images=2, newest="0002", program_ended=True)

    api.checkpoint_series = write
    words = ("checkpoint", "12", "--output", str(tmp_path), "--interval", "2min")
    shown = run(*words)
    assert shown.status == 0
    assert asked == {
        "pid": 12,
        "directory": tmp_path,
        "interval_s": 120.0,
        "keep": 5,
        "tcp_close": False,
    }
    assert shown.out.splitlines() == [
        "0001: 3.0 MiB, 768 pages, whole; frozen 12.5 ms, 80 ms in all",
        "0002: 3.0 MiB, 768 pages, goes on from 0001; frozen 12.5 ms, 80 ms in all",
        f"pid 12 has ended; 2 images, the newest is {tmp_path / '0002'}",
    ]
    first, second, end = map(json.loads, run(*words, "--keep", "3", "--json").out.splitlines())
    assert asked["keep"] == 3
    assert (first["image"], first["goes_on_from"], first["freeze_ms"]) == ("0001", "", 12.5)
    assert (second["image"], second["goes_on_from"], second["pages"]) == ("0002", "0001", 768)
    assert end == {"ended": {"images": 2, "newest": "0002", "program_ended": True}}


def test_an_interrupted_series_says_that_the_program_runs_on(
    run: Run, api: SimpleNamespace, tmp_path: Path
) -> None:
    api.checkpoint_series = lambda *_, **__: Ended(images=1, newest="0001", program_ended=False)
    shown = run("checkpoint", "12", "--output", str(tmp_path), "--interval", "30s")
    assert shown.out == f"interrupted; pid 12 runs on; 1 image, the newest is {tmp_path / '0001'}\n"


@pytest.mark.parametrize("words", [("--keep", "3"), ("--interval", "0"), ("--interval", "1s", "--keep", "0")])
def test_an_impossible_series_is_a_wrong_request(
    run: Run, api: SimpleNamespace, tmp_path: Path, words: tuple[str, ...]
) -> None:
    api.checkpoint_series = raising(AssertionError("it began"))
    api.checkpoint = raising(AssertionError("it began"))
    shown = run("checkpoint", "12", "--output", str(tmp_path), *words)
    assert shown.status == 2
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--tcp-established", "--shell-job", "--file-locks"])
def test_an_option_of_other_tools_is_noted_and_ignored(run: Run, api: SimpleNamespace, option: str) -> None:
    api.migrate = lambda *_, **__: REPORT
    shown = run("migrate", "12", "b", option)
    assert shown.status == 0
    assert f"note: {option} does nothing here" in shown.err


# --- restore


def restored(root_pid: int = 4242, wait: Callable[[], int] = lambda: 0) -> SimpleNamespace:
    return SimpleNamespace(root_pid=root_pid, pod_init=None, report=REPORT, wait=wait)


def test_restore_returns_the_programs_status(run: Run, api: SimpleNamespace, tmp_path: Path) -> None:
    api.restore = lambda *_, **__: restored(wait=lambda: 137)
    assert run("restore", str(tmp_path)).status == 137


def test_restore_with_detach_does_not_wait(run: Run, api: SimpleNamespace, tmp_path: Path) -> None:
    api.restore = lambda *_, **__: restored(wait=lambda: pytest.fail("it waited"))
    shown = run("restore", str(tmp_path), "--detach", "--json")
    assert shown.status == 0
    assert shown.json["root_pid"] == 4242
    assert shown.json["pod_init"] is None
    assert shown.json["report"]["strategy"] == "stopcopy"


def test_the_pid_file_is_there_before_the_wait(run: Run, api: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    seen: list[str] = []

    def wait() -> int:
        seen.append(file.read_text())
        return 0

    api.restore = lambda *_, **__: restored(wait=wait)
    assert run("restore", str(tmp_path), "--pid-file", str(file)).status == 0
    assert seen == ["4242\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def test_a_failed_restore_leaves_no_pid_file(run: Run, api: SimpleNamespace, tmp_path: Path) -> None:
    api.restore = raising(NoProcessError("gone"))
    assert run("restore", str(tmp_path), "--pid-file", str(tmp_path / "pid")).status == 5
    assert list(tmp_path.iterdir()) == []


def test_a_pid_file_that_cannot_be_written_is_found_before_anything_is_restored(
    run: Run, api: SimpleNamespace, tmp_path: Path
) -> None:
    api.restore = raising(AssertionError("it restored"))
    shown = run("restore", str(tmp_path), "--pid-file", str(tmp_path / "nowhere" / "pid"))
    assert shown.status == 2
    assert "nowhere" in shown.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_restored_program(
    run: Run, api: SimpleNamespace, tmp_path: Path, number: signal.Signals
) -> None:
    with subprocess.Popen(["sleep", "600"]) as program:

        def wait() -> int:
            os.kill(os.getpid(), number)
            return 128 - program.wait()

        api.restore = lambda *_, **__: restored(program.pid, wait)
        before = signal.getsignal(number)
        try:
            assert run("restore", str(tmp_path)).status == 128 + number
        finally:
            program.kill()
        assert signal.getsignal(number) == before


# --- receive, recover, certs


def test_receive_announces_where_it_listens(run: Run, api: SimpleNamespace, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def serve(listen: str, certs: Path, *, once: bool, ready: Callable[[str], None]) -> None:
        asked.update(listen=listen, certs=certs, once=once)
        ready("127.0.0.1:7001")

    api.serve_tls = serve
    shown = run("receive", "--listen", "127.0.0.1:0", "--certs", str(tmp_path), "--once", "--json")
    assert shown.status == 0
    assert shown.json == {"listening": "127.0.0.1:7001"}
    assert asked == {"listen": "127.0.0.1:0", "certs": tmp_path, "once": True}


def test_receive_on_standard_output_prints_nothing_of_its_own(run: Run, api: SimpleNamespace) -> None:
    api.serve_stdio = lambda: None
    shown = run("receive", "--stdio")
    assert (shown.status, shown.out, shown.err) == (0, "", "")


@pytest.mark.parametrize(
    ("outcome", "status"), [("resumed here", 0), ("still undecided: tls://b does not answer", 9)]
)
def test_recover_tells_whether_something_still_waits(
    run: Run, api: SimpleNamespace, outcome: str, status: int
) -> None:
    settled = SimpleNamespace(migration="m-1", role="source", outcome=outcome, pid=12)
    api.recover = lambda: (settled,)
    shown = run("recover")
    assert shown.status == status
    assert outcome in shown.out
    assert run("recover", "--json").json == {
        "recovered": [{"migration": "m-1", "role": "source", "outcome": outcome, "pid": 12}]
    }


def test_recover_with_nothing_to_do_says_so(run: Run, api: SimpleNamespace) -> None:
    api.recover = lambda: ()
    shown = run("recover")
    assert (shown.status, shown.out) == (0, "nothing to recover\n")


def test_certs_makes_an_identity_for_each_host(run: Run, tmp_path: Path) -> None:
    shown = run("certs", str(tmp_path / "certs"), "alpha,10.0.0.1", "beta", "--json")
    assert shown.status == 0
    assert [host["name"] for host in shown.json["hosts"]] == ["alpha", "beta"]
    for host in shown.json["hosts"]:
        made = {path.name: path for path in Path(host["directory"]).iterdir()}
        assert made.keys() == {"ca.pem", "node.pem", "node.key"}
        assert made["node.key"].stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("hosts", [("../x",), ("a/b",), ("",), ("a", "a"), ("a,b c",)])
def test_certs_refuses_what_is_no_host(run: Run, tmp_path: Path, hosts: tuple[str, ...]) -> None:
    assert run("certs", str(tmp_path / "certs"), *hosts).status == 2
    assert list(tmp_path.iterdir()) == []


def test_certs_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "beta").mkdir()
    assert run("certs", str(tmp_path), "alpha", "beta").status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["beta"]
