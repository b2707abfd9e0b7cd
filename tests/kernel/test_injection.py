"""Calls injected into a running program, and what the program notices of them: nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.engine import freeze
from godwit.linux import mem, ptrace
from godwit.procfs import maps
from godwit.tracee import calls, gadgets
from godwit.types import Pid, Tid
from tests.conftest import requires

# Sums in floating point (its registers hold live values at every moment), waits on a pipe with epoll,
# and counts the turns in a file. Any wrong value, error or lost thread ends it.
PROGRAM = """
import os, select, sys, threading, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
reading, writing = os.pipe()
def turn():
    while True:
        os.write(writing, b"x")
threading.Thread(target=turn, daemon=True).start()
watch = select.epoll()
watch.register(reading, select.EPOLLIN)
count = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
turns = 0
while True:
    assert watch.poll(10), "nothing came"
    os.read(reading, 4096)
    assert sum(i * 0.5 for i in range(200)) == 9950.0
    # A tracer's death may leave SIGTRAP blocked, which nobody but a debugger sends.
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) - {signal.SIGTRAP} == {signal.SIGUSR1}
    turns += 1
    os.pwrite(count, str(turns).encode(), 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A program that checks itself, and the file in which it counts."""
    count = tmp_path / "count"
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(count)], start_new_session=True)
    try:
        wait_for_turns(child, count, 1)
        yield child, count
    finally:
        child.kill()
        child.wait()


def turns(count: Path) -> int:
    """Return how far the program has counted."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(count.read_text())
    return 0


def wait_for_turns(child: subprocess.Popen[bytes], count: Path, wanted: int) -> None:
    """Wait until the program has counted so far."""
    deadline = time.monotonic() + 20
    while turns(count) < wanted:
        assert child.poll() is None, f"the program ended with {child.returncode}"
        assert time.monotonic() < deadline, f"the program stands at {turns(count)}"
        os.sched_yield()


def apart(work: Callable[[], None]) -> int:
    """Run `work` in a child; return its wait status."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1]


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def found(pid: Pid) -> gadgets.Gadgets:
    """Find what calls with a way back need; this machine's programs have it."""
    mappings = maps.read_maps(pid)
    (vdso,) = [mapping for mapping in mappings if mapping.path == "[vdso]"]
    with mem.open_memory(pid) as memory:
        text = os.pread(memory.number, vdso.length_bytes, vdso.start)
        known = gadgets.find(mappings, memory, text)
    assert known is not None
    assert known.sigreturn
    return known


def die_at_call(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Die right after the thread was let go towards the nth stop at a system call."""
    real, count = ptrace.resume_to_call, 0

    def resume_to_call(tid: Tid) -> None:
        nonlocal count
        count += 1
        real(tid)
        if count == nth:
            die()

    monkeypatch.setattr(ptrace, "resume_to_call", resume_to_call)


@requires("root")
def test_a_program_does_not_notice_a_thousand_injections(
    program: tuple[subprocess.Popen[bytes], Path],
) -> None:
    child, count = program

    def work() -> None:
        for _ in range(200):
            with freeze.frozen(Pid(child.pid)) as tree:
                for task in tree.threads():
                    with calls.opened(task) as workshop:
                        for _ in range(3):
                            assert workshop.call(task, "getpid") == child.pid
                    task.restore()

    assert apart(work) == 0
    wait_for_turns(child, count, turns(count) + 100)


@requires("root")
@pytest.mark.parametrize(
    "moment",
    ["frozen", "mapping", "mapped", "entered", "resumed", "trapped", "restored", "unmapping", "unmapped"],
)
def test_a_program_survives_the_death_of_its_tracer_at_any_moment(
    program: tuple[subprocess.Popen[bytes], Path], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, count = program

    def work() -> None:
        tree = freeze.freeze(Pid(child.pid))
        if moment == "frozen":
            die()
        task = tree.leader(Pid(child.pid))
        if moment in ("mapping", "mapped"):
            die_at_call(monkeypatch, 1 if moment == "mapping" else 2)
        workshop = calls.map_workshop(task, frames=True, gadgets=found(Pid(child.pid)))
        batch = workshop.batch(task)
        batch.add("getppid")
        if moment == "entered":
            batch.enter()
            die()
        if moment == "resumed":
            batch.enter()

            ptrace.resume(task.tid)
            die()
        batch.run()
        if moment == "trapped":
            die()
        task.restore()
        if moment in ("unmapping", "unmapped"):
            die_at_call(monkeypatch, 1 if moment == "unmapping" else 2)
            workshop.unmap(task)
        die()

    for _ in range(20):
        assert os.WTERMSIG(apart(work)) == signal.SIGKILL
        wait_for_turns(child, count, turns(count) + 20)
