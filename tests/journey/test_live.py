"""Live moves: budgets that are kept or the move undone, ^C at every stage, and what they leave behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from godwit.cli.main import INTERRUPTED
from godwit.errors import MigrationError, RefusedError
from godwit.lab.cluster import Lab, Node
from tests.conftest import requires
from tests.journey.live import STRATEGIES, Live, traces_of_tracking, undone
from tests.journey.transfer import GODWIT, QUIET_TIMEOUT_S, Program, complaint, environment, run_godwit
from tests.workloads.driver import WORKLOADS, wait_until

pytestmark = requires("root")

FAST = ("mib=64", "rate=100000")  # more than any machine can: as fast as can be
CALM = ("mib=32", "rate=4")
SLOW_LINE = ("--bandwidth", "4MB/s")  # 32 MiB take 8 s
BEFORE = ("precopy", "hybrid", "auto")  # strategies that begin with rounds
PURE = ("stopcopy", "precopy", "postcopy")  # the others are made of these
ROUND_LINE = r"copying 1, .* of "


@pytest.fixture
def live(lab: Lab, shared: Path) -> Iterator[Live]:
    """Moves in the laboratory, with words of the test's choice."""
    transfer = Live(shared, lab)
    yield transfer
    transfer.close()


def move_by(live: Live, program: Program, strategy: str, destination: str, *words: str) -> dict[str, Any]:
    """Move it; return the report."""
    live.words = (*STRATEGIES[strategy], *words)
    live.move(program, destination)
    return program.reports[-1]


# --- budgets --------------------------------------------------------------------------------------


def test_a_freeze_that_would_be_too_long_does_not_happen(live: Live) -> None:
    program = live.start("writer_c", FAST)
    why = undone(live.attempt(program, "b", "--strategy", "precopy", "--max-freeze", "20ms"))
    # Either the rounds have shown it, or the freeze was cut short; both say what was allowed.
    assert re.search(r"\b20(\.0)? ms", why), why
    live.expect_undone(program, "b")
    live.finish(program)


@pytest.mark.parametrize("strategy", ["precopy", "hybrid", "auto", "postcopy"])
def test_a_freeze_within_its_budget_happens(live: Live, strategy: str) -> None:
    program = live.start("writer_c", CALM)
    report = move_by(live, program, strategy, "b", "--max-freeze", "2s")
    assert report["freeze_ms"] <= 2000
    live.finish(program)


def test_a_budget_that_nothing_fits_is_refused_before_the_first_round(live: Live) -> None:
    program = live.start("writer_c", CALM)
    why = undone(live.attempt(program, "b", "--strategy", "precopy", "--max-freeze", "1ms"))
    assert "a freeze without memory would take" in why
    live.expect_undone(program, "b")
    live.finish(program)


def test_a_freeze_ends_in_time_however_slow_the_line_is(live: Live) -> None:
    program = live.start("writer_c", CALM)
    words = ("--strategy", "stopcopy", "--max-freeze", "300ms", "--bandwidth", "100kB/s")
    told = re.search(r"undone after ([0-9.]+) ms", why := undone(live.attempt(program, "b", *words)))
    # To send a chunk takes ten seconds.
    assert told is not None, why
    assert 300 <= float(told[1]) <= 1000, why
    live.expect_undone(program, "b")
    live.finish(program)


def test_a_freeze_ends_in_time_when_nobody_answers(live: Live, lab: Lab) -> None:
    program = live.start("writer_c", CALM)
    with live.begin(program, "b", "--strategy", "stopcopy", "--max-freeze", "5s", *SLOW_LINE) as command:
        command.wait_for("memory, .* of ")
        lab.partition("b")
        try:
            # Alone for its silence the destination would be given up after a minute.
            done = command.finish(deadline_s=30)
        finally:
            lab.heal("b")
    assert done.returncode == MigrationError.exit_status, complaint(done)
    assert "the freeze would have lasted more than 5000 ms" in done.stderr
    live.expect_undone(program, "b")
    live.finish(program)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rate", ["4MB/s", "100kB/s"])
def test_a_move_that_is_not_decided_in_time_is_undone(live: Live, strategy: str, rate: str) -> None:
    program = live.start("writer_c", CALM)
    began = time.monotonic()
    # Post-copy decides before most of its memory has gone over: a second is too long for it.
    allowed = "1ms" if strategy == "postcopy" else "1s"
    words = ("--strategy", strategy, "--timeout", allowed, "--bandwidth", rate)
    why = undone(live.attempt(program, "b", *words))
    assert "longer than allowed" in why or "are left" in why, why
    assert time.monotonic() - began < 8, "a chunk or all of it was sent before the time was looked at"
    live.expect_undone(program, "b")
    live.finish(program)


class Meter:
    """How many bytes a node sends in a second, over windows of a second, as its network card counts."""

    def __init__(self, node: Node) -> None:
        self._counters = node.path("proc/1/net/dev")
        self._seen: list[tuple[int, float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.02):
            before = time.monotonic()
            rows = [line.split() for line in self._counters.read_text().splitlines()[2:]]
            sent = sum(int(row[9]) for row in rows if row[0] != "lo:")
            self._seen.append((sent, before, time.monotonic()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def most(self) -> float:
        """Return the highest rate over a second. What is uncertain about a moment makes it lower."""
        rates = [0.0]
        for sent, _, since in self._seen:
            later = next(((more, at, end) for more, at, end in self._seen if at >= since + 1), None)
            if later is not None:
                rates.append((later[0] - sent) / (later[2] - since))
        return max(rates)


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=() if name in PURE else pytest.mark.slow) for name in STRATEGIES]
)
def test_a_line_is_not_used_more_than_allowed(live: Live, strategy: str) -> None:
    program = live.start("writer_c", CALM)
    with Meter(live.lab.node("a")) as meter:
        report = move_by(live, program, strategy, "b", "--bandwidth", "8MB/s")
    assert report["bytes_sent"] > 8e6 * 1.2, "less than what goes over in a second shows nothing"
    assert report["bytes_sent"] / (report["total_ms"] / 1000) <= 8e6 * 1.2
    assert meter.most() <= 8e6 * 1.2, f"{meter.most() / 1e6:.1f} MB/s"
    assert meter.most() > 8e6 * 0.2, "nothing was measured"
    live.finish(program)


@pytest.mark.parametrize("strategy", ["precopy", "hybrid", "auto"])
def test_memory_goes_over_several_lines(live: Live, strategy: str) -> None:
    program = live.start("writer_c", ("mib=128", "rate=50"))
    for destination in "ba":
        report = move_by(live, program, strategy, destination, "--connections", "3")
        assert report["bytes_sent"] > 120 << 20
    live.finish(program)


# --- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", BEFORE)
def test_an_interrupt_in_the_rounds_undoes_the_move(live: Live, strategy: str) -> None:
    program = live.start("writer_c", CALM)
    with live.begin(program, "b", "--strategy", strategy, *SLOW_LINE) as command:
        command.wait_for(ROUND_LINE)
        command.interrupt()
        done = command.finish()
    expect_interrupted(done)
    live.expect_undone(program, "b")
    live.finish(program)


def test_an_interrupt_in_the_freeze_undoes_the_move(live: Live) -> None:
    program = live.start("writer_c", CALM)
    with live.begin(program, "b", "--strategy", "stopcopy", *SLOW_LINE) as command:
        command.wait_for("memory, .* of ")
        command.interrupt()
        done = command.finish()
    expect_interrupted(done)
    live.expect_undone(program, "b")
    live.finish(program)


def expect_interrupted(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == INTERRUPTED, complaint(done)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "godwit: interrupted"


@pytest.mark.parametrize("strategy", ["postcopy", "hybrid"])
def test_an_interrupt_after_the_decision_lets_the_move_go_on(live: Live, strategy: str) -> None:
    program = live.start("writer_c", ("mib=32", "rate=20"))
    # Hybrid leaves behind what was written while its rounds went on.
    with live.begin(program, "b", "--strategy", strategy, "--bandwidth", "12MB/s") as command:
        command.wait_for("following, .* of ")
        for _ in range(3):
            command.interrupt()
            program.running.wait_alive(more=1)
        done = command.finish()
    assert done.returncode == 0, complaint(done)
    assert done.stdout.split()[-3:] == ["runs", "at", "destination"], done.stdout
    live.came(program, "b", pid_in(done.stdout))
    live.finish(program)


# --- what people see ------------------------------------------------------------------------------


def test_lines_tell_the_round_the_time_left_and_the_freeze(live: Live) -> None:
    program = live.start("writer_c", ("mib=32", "rate=8"))
    with live.begin(program, "b", "--strategy", "precopy", "--bandwidth", "24MB/s") as command:
        done = command.finish()
    assert done.returncode == 0, complaint(done)
    title = re.escape(f"pid {program.pid} to b: ")
    assert re.search(rf"^{title}copying 1, [0-9.]+ \w+ of [0-9.]+ \w+", done.stderr, re.MULTILINE), done
    told = re.compile(rf"^{title}copying [2-9], .*, ([0-9.]+) s left, freeze ([0-9]+) ms$", re.MULTILINE)
    assert told.search(done.stderr), done.stderr
    live.came(program, "b", pid_in(done.stdout))
    live.finish(program)


@pytest.mark.parametrize("columns", [80, 160])
def test_a_bar_tells_the_round_the_time_left_and_the_freeze(live: Live, columns: int) -> None:
    program = live.start("writer_c", ("mib=32", "rate=8"))
    words = ("--strategy", "precopy", "--bandwidth", "24MB/s")
    with live.begin(program, "b", *words, columns=columns) as command:
        done = command.finish()
    assert done.returncode == 0, complaint(done)
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stderr))
    assert any("copying 1" in frame for frame in frames), frames
    wanted = re.compile(r"copying [2-9].* [0-9.]+ s left.* freeze [0-9]+ ms")
    assert any(wanted.search(frame) for frame in frames), frames
    live.came(program, "b", pid_in(done.stdout))
    live.finish(program)


def pid_in(report: str) -> int:
    """Return the pid that a report for people names."""
    words = report.split()
    return int(words[words.index("pid") + 1])


# --- the timeline ---------------------------------------------------------------------------------


def plotted(trace: Path) -> dict[str, Any]:
    done = run_godwit("bench", "plot", trace, "--json")
    assert done.returncode == 0, complaint(done)
    told: dict[str, Any] = json.loads(done.stdout)
    assert Path(told["output"]).exists()
    return told


@pytest.fixture
def directory(shared: Path) -> Path:
    """A directory that the nodes see as /shared/NAME."""
    return Path(tempfile.mkdtemp(prefix="trace-", dir=shared))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_timeline_agrees_with_the_report(live: Live, directory: Path, strategy: str) -> None:
    program = live.start("writer_c", CALM)
    report = move_by(live, program, strategy, "b", "--trace", f"/shared/{directory.name}/move.json")
    told = plotted(directory / "move.json")
    assert told["migration"] == report["migration"]
    assert told["strategy"] == report["strategy"]
    assert told["freeze_ms"] == pytest.approx(report["freeze_ms"], abs=0.01)
    before = {"stopcopy": 0, "postcopy": 0}.get(report["strategy"], report["rounds"] - 1)
    assert len(told["rounds"]) == before
    assert {"freeze", "capture", "commit"} & {step["name"] for step in told["steps"]}
    live.finish(program)


def test_the_timeline_of_an_undone_move_shows_its_rounds(live: Live, directory: Path) -> None:
    program = live.start("writer_c", FAST)
    trace = f"/shared/{directory.name}/move.json"
    words = ("--strategy", "precopy", "--max-freeze", "20ms", "--trace", trace)
    undone(live.attempt(program, "b", *words))
    told = plotted(directory / "move.json")
    assert told["rounds"], told
    assert told["rounds"][0]["sent_pages"] > 0
    live.expect_undone(program, "b")
    live.finish(program)


def test_the_timeline_of_an_interrupted_move_can_be_drawn(live: Live, directory: Path) -> None:
    program = live.start("writer_c", CALM)
    trace = f"/shared/{directory.name}/move.json"
    with live.begin(program, "b", "--strategy", "precopy", "--trace", trace, *SLOW_LINE) as command:
        command.wait_for(ROUND_LINE)
        command.interrupt()
        expect_interrupted(command.finish())
    assert plotted(directory / "move.json")["freeze_ms"] is None
    live.expect_undone(program, "b")
    live.finish(program)


# --- what memory there is -------------------------------------------------------------------------

# Watches writes to its own memory: the kernel has room for one who does.
OWN_WATCH = """
import ctypes, fcntl, mmap, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
assert fd >= 0, os.strerror(ctypes.get_errno())
fcntl.ioctl(fd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
memory = mmap.mmap(-1, 1 << 20)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(fd, 0xC020AA00, struct.pack("QQQQ", start, 1 << 20, 2, 0))
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):
    os.sched_yield()
"""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_program_with_a_userfaultfd_of_its_own_is_refused_by_name(
    live: Live, lab: Lab, directory: Path, strategy: str
) -> None:
    node, inside = lab.node("a"), f"/shared/{directory.name}"
    words = [sys.executable, "-c", OWN_WATCH, f"{inside}/stop"]
    started = node.start(words, env=environment(), stdout=f"{inside}/out", stderr=f"{inside}/err")
    try:
        out = directory / "out"
        assert wait_until(lambda: out.exists() and bool(out.read_text()), QUIET_TIMEOUT_S), (
            directory / "err"
        ).read_text()
        # Which is also what a watch of ours would leave, and `expect_undone` looks for.
        assert len(list(traces_of_tracking(node))) == 2
        line = [*GODWIT, "migrate", str(started.node_pid), "b", "--json", *STRATEGIES[strategy]]
        done = node.run(line, env=environment())
        assert done.returncode == RefusedError.exit_status, complaint(done)
        refusals = json.loads(done.stdout)["error"]["refusals"]
        assert any("userfaultfd" in refusal["what"] for refusal in refusals), refusals
        assert started.alive()
        assert lab.node("b").pids() == []
    finally:
        (directory / "stop").touch()
        ended = started.wait(QUIET_TIMEOUT_S)
        started.close()
    assert ended, "it was not let go"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_of_every_kind_arrives(live: Live, strategy: str) -> None:
    program = live.start("spaces_c", ("rate=0",))
    for destination in ("b", "a"):
        move_by(live, program, strategy, destination)
    live.finish(program)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_server_under_a_writing_client_loses_nothing(live: Live, strategy: str) -> None:
    reason = WORKLOADS["redis_py"].available()
    if reason is not None:
        pytest.skip(reason)
    program = live.start("redis_py")
    move_by(live, program, strategy, "b", "--tcp-close")
    live.finish(program)
