"""Programs whose home stays where they were started: their files are there, and so are their pids."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from godwit.errors import RefusedError, RequestError
from godwit.lab.cluster import Lab, Node
from tests.conftest import requires
from tests.journey.live import STRATEGIES
from tests.journey.transfer import GODWIT, complaint, environment
from tests.workloads.driver import wait_until

pytestmark = requires("root", "command:python3")

DEADLINE_S = 20.0
MOVE_S = 60.0
HOME = "/srv/job"  # exists in the first node alone

PROGRAM = """
import os, signal, sys
log = open("log", "a", buffering=1)
shift = lambda number, frame: print("signal", number, file=log)
signal.signal(signal.SIGUSR1, shift)
signal.signal(signal.SIGTERM, lambda number, frame: (print("exit", file=log), os._exit(7)))
kept = open("kept")
open("pid", "w").write(str(os.getpid()))
number = 0
while True:
    number += 1
    print("line", number, os.getpid(), os.path.exists("only-at-home"), file=log)
    if os.path.exists("ask"):
        print("told", open("ask").read(), kept.read(), file=log)
        os.unlink("ask")
    signal.sigtimedwait([], 0.05)
"""


class Job:
    """A program at home in node a, and the shell that waits for it."""

    def __init__(self, lab: Lab, command: str = "/usr/bin/python3 program.py", uid: int = 0) -> None:
        self.lab = lab
        self.home = lab.node("a")
        self.files = self.home.path(HOME)
        self.files.mkdir(parents=True)
        (self.files / "program.py").write_text(PROGRAM)
        (self.files / "kept").write_text("kept by the program")
        (self.files / "only-at-home").touch()
        os.chown(self.files, uid, uid)
        words = ["/bin/sh", "-c", f"{command}; echo $? > status"]
        self.shell = self.home.start(words, cwd=HOME, stderr=f"{HOME}/stderr", env=environment())
        assert wait_until(lambda: self.read("pid").isdigit(), DEADLINE_S), self.read("stderr")
        self.pid = int(self.read("pid"))
        for path in self.files.iterdir():
            os.chown(path, uid, uid)

    def read(self, name: str) -> str:
        try:
            return (self.files / name).read_text()
        except FileNotFoundError:
            return ""

    def lines(self) -> list[str]:
        return self.read("log").splitlines()

    def wait_for(self, line: str) -> None:
        assert wait_until(lambda: line in self.lines(), DEADLINE_S), (self.lines()[-5:], self.read("stderr"))

    def goes_on(self) -> None:
        """See it write three more lines, none left out, with the pid it always had, seeing its own files."""
        before = len(self.lines())
        assert wait_until(lambda: len(self.lines()) > before + 3, DEADLINE_S), self.lines()[-5:]
        told = [line.split() for line in self.lines() if line.startswith("line")]
        assert [int(words[1]) for words in told] == list(range(1, len(told) + 1))
        assert {(words[2], words[3]) for words in told} == {(str(self.pid), "True")}

    def move(self, node: str, *more: str) -> None:
        line = [*GODWIT, "migrate", str(self.pid), node, "--home", "--json", *more]
        done = self.home.run(line, env=environment() | {"GODWIT_KEEPER_IDLE_S": "1"}, timeout_s=MOVE_S)
        logs = [self.lab.node(each).path("/var/lib/godwit/keeper/log") for each in ("a", node)]
        assert done.returncode == 0, complaint(done) + "".join(
            path.read_text() for path in logs if path.exists()
        )
        assert json.loads(done.stdout)["destination"] == node

    def kill(self, number: int) -> None:
        self.home.run(["kill", f"-{number}", str(self.pid)])

    def close(self) -> None:
        for node in self.lab.nodes:
            for pid in node.pids():
                node.run(["kill", "-9", str(pid)])


@contextlib.contextmanager
def started(lab: Lab, command: str = "/usr/bin/python3 program.py", uid: int = 0) -> Iterator[Job]:
    running = Job(lab, command, uid)
    try:
        yield running
    finally:
        running.close()
        shutil.rmtree(running.files)


@pytest.fixture
def job(lab: Lab) -> Iterator[Job]:
    with started(lab) as running:
        yield running


def expect_nobody(node: Node) -> None:
    """See the node empty in the end: a keeper without a job ends after a while."""
    assert wait_until(lambda: not node.pids(), DEADLINE_S), [
        node.path(f"proc/{pid}/cmdline").read_text() for pid in node.pids()
    ]


def test_files_pid_signals_and_exit_status_stay_at_home(job: Job, lab: Lab) -> None:
    job.goes_on()
    before = job.home.path(f"proc/{job.pid}/cmdline").read_bytes()
    job.move("b")
    away = lab.node("b")
    job.goes_on()
    assert not away.path(HOME).exists()
    # What home writes, the program reads; its own descriptors are where they were.
    (job.files / "ask.new").write_text("a question")
    os.rename(job.files / "ask.new", job.files / "ask")
    job.wait_for("told a question kept by the program")
    assert wait_until(lambda: not (job.files / "ask").exists(), DEADLINE_S)
    # ps(1) at home sees what it always saw.
    assert job.home.path(f"proc/{job.pid}/cmdline").read_bytes() == before
    assert any(b"program.py" in away.path(f"proc/{pid}/cmdline").read_bytes() for pid in away.pids())
    job.kill(signal.SIGUSR1)
    job.wait_for(f"signal {int(signal.SIGUSR1)}")
    job.kill(signal.SIGTERM)
    job.wait_for("exit")
    assert wait_until(lambda: job.read("status") == "7\n", DEADLINE_S), job.read("status")
    expect_nobody(job.home)
    expect_nobody(away)


def test_a_program_killed_at_home_is_killed_where_it_runs(job: Job, lab: Lab) -> None:
    job.move("b")
    job.goes_on()
    job.kill(signal.SIGKILL)
    assert wait_until(lambda: job.read("status") == f"{128 + int(signal.SIGKILL)}\n", DEADLINE_S)
    expect_nobody(lab.node("b"))
    expect_nobody(job.home)


def test_a_program_killed_where_it_runs_is_dead_at_home(job: Job, lab: Lab) -> None:
    job.move("b")
    away = lab.node("b")
    (pid,) = [pid for pid in away.pids() if b"program.py" in away.path(f"proc/{pid}/cmdline").read_bytes()]
    away.run(["kill", f"-{int(signal.SIGSEGV)}", str(pid)])
    assert wait_until(lambda: job.read("status") == f"{128 + int(signal.SIGSEGV)}\n", DEADLINE_S)
    expect_nobody(job.home)
    expect_nobody(away)


def test_files_are_reached_again_after_the_line_was_cut(job: Job, lab: Lab) -> None:
    job.move("b")
    job.goes_on()
    lab.partition("b")
    try:
        before = len(job.lines())
        job.kill(signal.SIGUSR1)
    finally:
        lab.heal("b")
    job.wait_for(f"signal {int(signal.SIGUSR1)}")
    assert len(job.lines()) > before
    job.goes_on()
    job.kill(signal.SIGTERM)
    assert wait_until(lambda: job.read("status") == "7\n", DEADLINE_S)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_home_stays_however_memory_is_moved(job: Job, lab: Lab, strategy: str) -> None:
    job.move("b", *STRATEGIES[strategy])
    job.goes_on()
    job.kill(signal.SIGTERM)
    assert wait_until(lambda: job.read("status") == "7\n", DEADLINE_S)
    expect_nobody(lab.node("b"))


@requires("command:setpriv")
def test_a_job_acts_at_home_as_its_user(lab: Lab) -> None:
    command = "setpriv --reuid 1000 --regid 1000 --clear-groups /usr/bin/python3 program.py"
    with started(lab, command, uid=1000) as job:
        job.move("b")
        job.goes_on()
        (job.files / "ask.new").write_text("who")
        os.chown(job.files / "ask.new", 1000, 1000)
        os.rename(job.files / "ask.new", job.files / "ask")
        job.wait_for("told who kept by the program")
        assert {path.stat().st_uid for path in (job.files / "log", job.files / "pid")} == {1000}
        job.kill(signal.SIGTERM)
        assert wait_until(lambda: job.read("status") == "7\n", DEADLINE_S)


def test_what_has_left_and_what_is_a_guest_cannot_be_moved(job: Job, lab: Lab) -> None:
    job.move("b")
    away = lab.node("b")
    (guest,) = [pid for pid in away.pids() if b"program.py" in away.path(f"proc/{pid}/cmdline").read_bytes()]
    for node, pid, why in (
        (job.home, job.pid, "has left: it runs at b"),
        (away, guest, "whose home is elsewhere"),
    ):
        done = node.run([*GODWIT, "migrate", str(pid), "c", "--json"], env=environment())
        assert done.returncode in {RequestError.exit_status, RefusedError.exit_status}, complaint(done)
        assert why in json.loads(done.stdout)["error"]["message"]
    job.goes_on()


def test_a_move_that_fails_leaves_the_home_as_it_was(job: Job, lab: Lab) -> None:
    line = [*GODWIT, "migrate", str(job.pid), "b", "--home", "--json", "--strategy", "stopcopy"]
    env = environment() | {"GODWIT_FAULT": "source:ready", "GODWIT_KEEPER_IDLE_S": "1"}
    done = job.home.run(line, env=env, timeout_s=MOVE_S)
    assert done.returncode != 0
    job.goes_on()
    expect_nobody(lab.node("b"))
    job.kill(signal.SIGTERM)
    assert wait_until(lambda: job.read("status") == "7\n", DEADLINE_S)
    expect_nobody(job.home)


@pytest.mark.parametrize("step", ["gone", "pushed", "killed"])
def test_deputies_stay_even_if_the_mover_is_killed(job: Job, lab: Lab, step: str) -> None:
    """After GO it is the warden, or `godwit recover`, that leaves them."""
    line = [*GODWIT, "migrate", str(job.pid), "b", "--home", "--json", "--strategy", "stopcopy"]
    env = environment() | {"GODWIT_FAULT": f"source:{step}", "GODWIT_KEEPER_IDLE_S": "1"}
    job.home.run(line, env=env, timeout_s=MOVE_S)
    job.home.run([*GODWIT, "recover"], env=environment(), timeout_s=MOVE_S)
    job.goes_on()
    assert any(
        b"program.py" in lab.node("b").path(f"proc/{pid}/cmdline").read_bytes()
        for pid in lab.node("b").pids()
    )
    job.kill(signal.SIGUSR1)
    job.wait_for(f"signal {int(signal.SIGUSR1)}")
    job.kill(signal.SIGTERM)
    assert wait_until(lambda: job.read("status") == "7\n", DEADLINE_S)
