"""Turning a process into its deputy: its threads' locks stay taken, and its program never runs again."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from godwit.engine import freeze
from godwit.linux import ptrace
from godwit.procfs import tasks
from godwit.residual import deputy, rest
from tests.conftest import requires
from tests.kernel.deputies import Keeping, Program, program, running, state, turned, until
from tests.kernel.test_injection import apart, die

pytestmark = requires("root")


@requires("command:cc")
def test_what_threads_held_in_shared_memory_stays_held(tmp_path: Path) -> None:
    robust, memory = str(tmp_path / "robust"), str(tmp_path / "memory")
    source = Path(__file__).with_name("robust.c")
    subprocess.run(["cc", "-O1", "-pthread", "-o", robust, str(source)], check=True)
    with running([robust, memory, "hold"]) as child:
        assert len(tasks.list_tids(child.pid)) == 22
        turned(child.pid)
        assert len(tasks.list_tids(child.pid)) == 1
        looked = subprocess.run([robust, memory, "try"], check=True, capture_output=True, text=True)
        assert looked.stdout == "EBUSY 4711\n"


COOKIE = bytes(range(16))
# Counts in a file, from two threads.
COUNTS = """
import mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR)
turns = mmap.mmap(fd, 16)
def count(at):
    n = 0
    while True:
        n += 1
        turns[at:at+8] = n.to_bytes(8, 'little')
        if n == 100: print('ready', flush=True)
threading.Thread(target=count, args=(0,), daemon=True).start()
count(8)
"""


def die_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die right after so many requests to ptrace(2)."""
    real, left = ptrace._ptrace, calls

    def _ptrace(*args: object) -> int:
        nonlocal left
        left -= 1
        result = real(*args)  # type: ignore[arg-type]
        if left == 0:
            die()
        return result

    monkeypatch.setattr(ptrace, "_ptrace", _ptrace)


def turn_and_die(child: Program, calls: int, notes: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Turn it in a process that dies after so many requests; tell whether it came so far."""
    real = rest.put_to_rest

    def put_to_rest(*args: object) -> object:
        found = real(*args)  # type: ignore[arg-type]
        notes.write_text("rested")
        return found

    def work() -> None:
        tree = freeze.freeze(child.pid)
        tree.park()
        monkeypatch.setattr(rest, "put_to_rest", put_to_rest)
        notes.write_text("parked")
        die_after(calls, monkeypatch)
        deputy.become(list(tree.tracees[child.pid].values()), COOKIE)

    status = apart(work)
    assert status in (0, signal.SIGKILL)
    return status != 0


def is_deputy(pid: int) -> bool:
    return "godwit-deputy" in os.readlink(f"/proc/{pid}/exe")


def never_runs_again(child: Program, turns: Path, notes: Path) -> None:
    """Give it every opportunity to run, and see that it does not."""
    settled = ("S", "T") if notes.read_text() == "rested" else ("T",)
    until(lambda: state(child.pid) in settled, "it stands still")
    before = turns.read_bytes()
    if notes.read_text() == "rested":
        for number in (signal.SIGCONT, signal.SIGUSR1, signal.SIGINT):
            os.kill(child.pid, number)
        until(lambda: state(child.pid) == "S", "it sleeps")
        threads = tasks.list_tids(child.pid)
        assert all("Z" not in state(tid) for tid in threads)
    assert turns.read_bytes() == before


def turn_again(child: Program) -> None:
    """Turn what is at rest, or was stopped before it came to rest, and see that it is a good deputy."""
    with Keeping() as keeper:
        stopped = state(child.pid) == "T"
        keeper.adopt(turned(child.pid)[child.pid])
        if stopped:
            # It was not at rest yet, and the SIGSTOP of parking has stopped it for all to see.
            keeper.next("Stopped")
            keeper.ask("cont", child.pid)
        os.kill(child.pid, signal.SIGTERM)
        while keeper.next("Signal")["signo"] != signal.SIGTERM:
            pass


def test_whoever_turns_it_may_die_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, notes = tmp_path / "turns", tmp_path / "notes"
    turns.write_bytes(bytes(16))
    calls, early, late = 0, 0, 0
    died = True
    while died:
        calls += 1
        with program(COUNTS, str(turns)) as child:
            with monkeypatch.context() as patch:
                died = turn_and_die(child, calls, notes, patch)
            never_runs_again(child, turns, notes)
            if is_deputy(child.pid):
                late += 1
                with Keeping() as keeper:
                    keeper.adopt(deputy.find(child.pid, COOKIE))
            else:
                early += 1
                turn_again(child)
    assert early > 20
    assert late > 1
