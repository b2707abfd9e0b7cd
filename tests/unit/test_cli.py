from __future__ import annotations

import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

import godwit.api
from godwit.cli import main as entry
from godwit.cli.main import cli, main
from godwit.errors import MigrationError, NoProcessError, Refusal, RefusedError, Survivor
from godwit.log import log
from godwit.migrate.report import ProgressEvent, Report
from godwit.resources.base import Disposition, Finding

ROOT = Path(__file__).resolve().parents[2]
TRUE_API = godwit.api

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


@dataclass(slots=True)
class Shown:
    """What a command printed and returned."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401
        (line,) = self.out.splitlines()
        return json.loads(line)


Run = Callable[..., Shown]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    def call(*words: str) -> Shown:
        status = main(words)
        out, err = capsys.readouterr()
        return Shown(status, out, err)

    yield call
    # The handler holds this test's standard error.
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


class FakeApi(SimpleNamespace):
    """Takes only calls that the true one would take."""

    def __setattr__(self, name: str, function: Callable[..., object]) -> None:
        wanted = inspect.signature(getattr(TRUE_API, name))

        def call(*args: object, **words: object) -> object:
            wanted.bind(*args, **words)
            return function(*args, **words)

        super().__setattr__(name, call)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for `godwit.api`; each test puts in what is called."""
    fake = FakeApi()
    monkeypatch.setattr(godwit, "api", fake)
    return fake


def raising(error: BaseException) -> Callable[..., object]:
    def call(*_: object, **__: object) -> object:
        raise error

    return call


def finding(disposition: Disposition, what: str, **words: str) -> Finding:
    return Finding(disposition=disposition, what=what, where=words.pop("where", "pid 12 fd 3"), **words)


def plan(*findings: Finding) -> Callable[..., object]:
    movable = all(each.disposition is not Disposition.REFUSE for each in findings)
    made = SimpleNamespace(pid=12, comm="work", findings=findings, movable=movable)
    return lambda *_, **__: made


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


# --- Words


def test_help_comes_without_heavy_libraries() -> None:
    heavy = "{'rich', 'ssl', 'cryptography', 'msgspec', 'asyncio', 'numpy', 'godwit.engine', 'godwit.lab'}"
    script = (
        f"import sys; from godwit.cli.main import main; main(['--help']); print({heavy} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "migrate" in done.stdout


def test_the_list_of_commands_says_what_the_commands_say() -> None:
    assert {name: command.get_short_help_str(200) for name, command in commands().items()} == entry.SUMMARIES


@pytest.mark.parametrize("name", entry.SUMMARIES)
def test_every_command_shows_examples_and_has_a_page(name: str) -> None:
    shown = CliRunner().invoke(cli, [name, "--help"]).output
    assert "Examples:" in shown
    page = (ROOT / "docs" / "man" / f"godwit-{name}.md").read_text()
    options = {
        option
        for parameter in commands()[name].params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for option in parameter.opts
    }
    common = (ROOT / "docs" / "man" / "godwit.md").read_text()
    assert [option for option in sorted(options) if f"`{option}" not in page + common] == []
    assert f"`godwit {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete"), ("zsh", "compdef"), ("fish", "complete --no-files")]
)
def test_completion_is_for_the_shell_that_was_asked_for(run: Run, shell: str, word: str) -> None:
    shown = run("completion", shell)
    assert shown.status == 0
    assert word in shown.out
    assert "_GODWIT_COMPLETE" in shown.out


def test_a_pid_is_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mine = str(os.getpid())
    monkeypatch.setenv("_GODWIT_COMPLETE", "fish_complete")
    monkeypatch.setenv("COMP_WORDS", f"godwit check {mine}")
    monkeypatch.setenv("COMP_CWORD", mine)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert mine in capsys.readouterr().out


# --- Failing


REFUSED = RefusedError(
    [
        Refusal(what="TCP connection", where="pid 12 fd 3", why="not carried yet", remedy="close it"),
        Refusal(what="terminal", where="pid 12 fd 0", why="stays with its user"),
    ]
)


def test_an_error_is_one_line_and_its_status(run: Run, api: SimpleNamespace) -> None:
    api.migrate = raising(REFUSED)
    shown = run("migrate", "12", "b")
    assert (shown.status, shown.out) == (3, "")
    assert shown.err == f"godwit: error: {REFUSED.line()}\n"


def test_an_error_is_an_object_with_json(run: Run, api: SimpleNamespace) -> None:
    api.migrate = raising(REFUSED)
    error = run("migrate", "12", "b", "--json").json["error"]
    assert error["class"] == "RefusedError"
    assert error["exit_status"] == 3
    assert error["survivor"] is None
    assert [each["where"] for each in error["refusals"]] == ["pid 12 fd 3", "pid 12 fd 0"]
    assert error["refusals"][0]["remedy"] == "close it"


def test_a_failed_move_names_the_survivor(run: Run, api: SimpleNamespace) -> None:
    api.migrate = raising(MigrationError("silence", survivor=Survivor.UNDECIDED, remedy="godwit recover"))
    shown = run("migrate", "12", "b", "--json")
    assert shown.status == 9
    assert shown.json["error"]["survivor"] == "undecided"
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("migrate", "12"),
        ("migrate", "0", "b"),
        ("migrate", "-5", "b"),
        ("check", "abc"),
        ("check", "99999999999"),
        ("chek", "12"),
        ("checkpoint", "12"),
        ("migrate", "12", "b", "--timeout", "0"),
        ("receive",),
        ("receive", "--stdio", "--listen", "a:1"),
        ("receive", "--listen", "a:1"),
        ("receive", "--stdio", "--once"),
        ("completion", "tcsh"),
    ],
)
def test_a_wrong_request_is_one_line_with_the_way_to_help(run: Run, words: tuple[str, ...]) -> None:
    shown = run(*words, "--json") if words[0] != "completion" else run(*words)
    assert shown.status == 2
    assert re.fullmatch(r"godwit: error: [^\n]+ --help`\n", shown.err)
    if words[0] != "completion":
        assert shown.json["error"]["class"] == "RequestError"


def test_no_words_show_the_help(run: Run) -> None:
    shown = run()
    assert shown.status == 2
    assert "Commands:" in shown.err


def test_a_bug_says_that_it_is_one(run: Run, api: SimpleNamespace) -> None:
    api.inspect = raising(KeyError("lost"))
    shown = run("check", "12")
    assert shown.status == 70
    assert shown.err.startswith("godwit: bug: KeyError: 'lost'")
    assert "Traceback" not in shown.err
    assert run("check", "12", "--json").json["error"]["exit_status"] == 70


@pytest.mark.parametrize("words", [("--debug", "check", "12"), ("check", "12", "-v")])
def test_a_bug_shows_where_it_arose_when_asked(
    run: Run, api: SimpleNamespace, words: tuple[str, ...]
) -> None:
    api.inspect = raising(KeyError("lost"))
    shown = run(*words)
    assert shown.status == 70
    assert "Traceback" in shown.err


def test_ctrl_c_returns_130(run: Run, api: SimpleNamespace) -> None:
    api.migrate = raising(KeyboardInterrupt())
    assert run("migrate", "12", "b").status == 130


def test_an_error_cannot_forge_lines(run: Run, api: SimpleNamespace) -> None:
    api.inspect = raising(NoProcessError("no \x1b[2J\nprogram \udcff"))
    shown = run("check", "12")
    assert shown.status == 5
    assert shown.err == "godwit: error: no \\x1b[2J\\nprogram \\udcff\n"
    assert "program" in run("check", "12", "--json").json["error"]["message"]


def test_a_reader_that_leaves_is_no_bug() -> None:
    script = "import sys; from godwit.cli.main import main; sys.exit(main(['completion', 'bash']))"
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, stdout=write, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# --- check


TABLE = (
    finding(Disposition.MOVE, "pipe", why="both ends"),
    finding(Disposition.REFUSE, "TCP connection", why="not carried yet", remedy="close it"),
    finding(Disposition.REBIND, "/dev/null", where="pid 12 fd 0"),
)


def test_check_shows_what_is_in_the_way_first_and_in_full(run: Run, api: SimpleNamespace) -> None:
    api.inspect = plan(*TABLE)
    shown = run("check", "12", "--to", "b")
    assert shown.status == 3
    assert shown.out.startswith("refuse (1)")
    for words in ("TCP connection", "not carried yet", "close it", "pipe", "/dev/null", "cannot move to b"):
        assert words in shown.out
    assert shown.out.index("close it") < shown.out.index("/dev/null") < shown.out.index("pipe")


def test_check_returns_0_when_it_can_move(run: Run, api: SimpleNamespace) -> None:
    api.inspect = plan(TABLE[0], TABLE[2])
    shown = run("check", "12")
    assert shown.status == 0
    assert "can move" in shown.out


def test_check_prints_every_finding_as_json(run: Run, api: SimpleNamespace) -> None:
    api.inspect = plan(*TABLE)
    shown = run("check", "12", "--json")
    assert shown.status == 3
    assert shown.json["pid"] == 12
    assert shown.json["movable"] is False
    assert shown.json["findings"][1] == {
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
