"""A shell at home controls the job that has left as if it had not."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import time
from collections.abc import Iterator

import pytest

from godwit.procfs import stat, tasks
from godwit.types import Pid
from tests.conftest import requires
from tests.kernel.deputies import DEADLINE_S, Keeping, Told, state, turned, until

pytestmark = requires("root", "command:bash")


class Shell:
    """An interactive bash on a terminal of its own."""

    def __init__(self, pid: int, master: int) -> None:
        self.pid = Pid(pid)
        self._master = master
        self.shown = ""
        self.jobs: list[Pid] = []

    def type(self, text: str, job: Pid | None = None) -> None:
        """Type something, once the shell has given the terminal to the job it is meant for."""
        if job is not None:
            until(lambda: stat.read(self.pid).tpgid == job, "the job has the terminal")
        os.write(self._master, text.encode())

    def see(self, pattern: str) -> re.Match[str]:
        """Return where the pattern is shown; what stands before is not looked at again."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 4096).decode()
        self.shown = self.shown[found.end() :]
        return found

    def job(self) -> Pid:
        """Return the one child of the shell, once it has executed its program."""

        def child() -> Pid | None:
            for pid in tasks.children(self.pid):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/exe").endswith("/sleep") and state(pid) == "S":
                        return pid
            return None

        self.jobs.append(found := until(child, "the job"))
        return found


@pytest.fixture
def shell() -> Iterator[Shell]:
    pid, master = pty.fork()
    if pid == 0:
        os.environ |= {"PS1": "home> ", "TERM": "dumb", "LC_ALL": "C"}
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    shell = Shell(pid, master)
    try:
        shell.see("home> ")
        yield shell
    finally:
        for job in shell.jobs:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{job}/exe").startswith("/memfd:godwit-deputy"):
                    os.kill(job, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(master)


def remote(keeper: Keeping, pid: Pid) -> Told:
    """Be the program, which does with the next signal what is done by default; return the signal."""
    told = keeper.next("Signal", pid)
    number = told["signo"]
    if number == signal.SIGTSTP:
        keeper.ask("stop", pid, number)
    elif number == signal.SIGCONT:
        keeper.ask("cont", pid)
    elif number not in (signal.SIGSTOP, signal.SIGCHLD, signal.SIGWINCH):
        keeper.ask("die", pid, number)
    return told


def test_a_shell_stops_continues_and_ends_its_job(shell: Shell) -> None:
    with Keeping() as keeper:
        shell.type("sleep 1000\n")
        job = shell.job()
        keeper.adopt(turned(job)[job])
        for _ in range(3):
            shell.type("\x1a", job)
            assert remote(keeper, job)["signo"] == signal.SIGTSTP
            shell.see(r"Stopped +sleep 1000\r\nhome> ")
            shell.type("jobs\n")
            shell.see(r"\[1\]\+ +Stopped +sleep 1000\r\nhome> ")
            shell.type("bg\n")
            assert remote(keeper, job)["signo"] == signal.SIGCONT
            shell.see("home> ")
            shell.type("jobs\n")
            shell.see(r"\[1\]\+ +Running +sleep 1000 &\r\nhome> ")
            # bash sends no SIGCONT to a job that runs.
            shell.type("fg\n")
            shell.see("sleep 1000\r\n")
        shell.type("\x03", job)
        assert remote(keeper, job)["signo"] == signal.SIGINT
        shell.see("home> ")
        shell.type("echo $?\n")
        shell.see(r"\r\n130\r\n")
        assert keeper.next("Ended", job)["status"] == signal.SIGINT


def test_a_shell_waits_for_its_job(shell: Shell) -> None:
    with Keeping() as keeper:
        shell.type("sleep 1000 &\n")
        job = shell.job()
        keeper.adopt(turned(job)[job])
        shell.type("wait %1; echo $?\n")
        shell.see(r"echo \$\?\r\n")
        keeper.ask("exit", job, 7)
        shell.see(r"\r\n7\r\n")


def test_a_shell_kills_its_job(shell: Shell) -> None:
    with Keeping() as keeper:
        shell.type("sleep 1000 &\n")
        job = shell.job()
        keeper.adopt(turned(job)[job])
        shell.type("kill -STOP %1; jobs\n")
        assert remote(keeper, job)["signo"] == signal.SIGSTOP
        keeper.next("Stopped", job)
        shell.type("kill %1\n")
        # bash sends SIGCONT behind the SIGTERM to a stopped job.
        assert {keeper.next("Signal", job)["signo"] for _ in range(2)} == {signal.SIGTERM, signal.SIGCONT}
        keeper.ask("die", job, signal.SIGTERM)
        keeper.next("Ended", job)
        shell.type("wait %1; echo $?\n")
        shell.see(r"\r\n143\r\n")


def test_a_shell_that_hangs_up_tells_its_stopped_job(shell: Shell) -> None:
    with Keeping() as keeper:
        shell.type("sleep 1000\n")
        job = shell.job()
        keeper.adopt(turned(job)[job])
        shell.type("\x1a", job)
        remote(keeper, job)
        shell.see(r"Stopped.*\s+home> ")
        os.kill(shell.pid, signal.SIGHUP)
        # Its shell, and the kernel for a group that nobody of its session looks after any more.
        heard: set[int] = set()
        while not {signal.SIGHUP, signal.SIGCONT} <= heard:
            heard.add(keeper.next("Signal", job)["signo"])
        keeper.ask("die", job, signal.SIGHUP)
        assert keeper.next("Ended", job)["status"] == signal.SIGHUP
