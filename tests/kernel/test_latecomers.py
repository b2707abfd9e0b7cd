"""Signals that reach a tree between its capture and the decision."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.engine import capture, freeze, latecomers, view
from godwit.errors import NoProcessError
from godwit.types import Pid
from tests.conftest import requires
from tests.kernel.counting import until
from tests.kernel.test_injection import apart, wait_for_turns

# Waits for real-time signals, which the kernel queues one by one, and counts them in a file.
PROGRAM = """
import signal, sys
wanted = {signal.SIGRTMIN}
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
count = 0
while True:
    open(sys.argv[1], "w").write(str(count))
    signal.sigwaitinfo(wanted)
    count += 1
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A program that counts signals, ready for them, and its file."""
    count = tmp_path / "count"
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(count)],
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    )
    try:
        until(lambda: count.exists() and count.read_text() == "0", "the program is ready")
        yield child, count
    finally:
        child.kill()
        child.wait()


def captured_then(pid: Pid, send: int, times: int, expected: int) -> None:
    """Freeze and capture, send signals, and see how many latecomers there are."""
    memory = view.of_mover(closes_connections=False)
    machine = capture.machine(view.look(pid, memory))
    with freeze.frozen(pid) as tree:
        os.kill(pid, send)
        seen = view.look(pid, memory)
        found = capture.capture(tree, seen, machine)
        found.close()
        for _ in range(times):
            os.kill(pid, send)
        late = latecomers.collect(tree, found.tree.processes, {found.tree.processes[0].identity.pid: pid})
        assert len(late) == expected
        for each in late:
            assert struct.unpack_from("<i", each.info)[0] == send
            assert each.tid == 0


@requires("root")
def test_only_what_came_after_the_capture_is_late(program: tuple[subprocess.Popen[bytes], Path]) -> None:
    child, count = program
    assert apart(lambda: captured_then(Pid(child.pid), signal.SIGRTMIN, 3, 3)) == 0
    # Nothing was taken away from the program itself: all four reach it once it is thawed.
    wait_for_turns(child, count, 4)


@requires("root")
def test_a_process_killed_while_frozen_is_noticed(program: tuple[subprocess.Popen[bytes], Path]) -> None:
    child, _ = program

    def work() -> None:
        with freeze.frozen(Pid(child.pid)) as tree:
            latecomers.check_alive(tree)
            os.kill(child.pid, signal.SIGKILL)
            while True:
                try:
                    latecomers.check_alive(tree)
                except NoProcessError:
                    return

    assert apart(work) == 0


@requires("root")
def test_latecomers_are_delivered_with_what_they_carry(
    program: tuple[subprocess.Popen[bytes], Path],
) -> None:
    child, count = program
    pid = Pid(child.pid)
    # SI_USER is rewritten as ours; SI_QUEUE is passed on as it is.
    by_kill = struct.pack("<iii", signal.SIGRTMIN, 0, 0).ljust(128, b"\0")
    by_queue = struct.pack("<iiixxxxiiQ", signal.SIGRTMIN, 0, -1, 1, 2, 77).ljust(128, b"\0")
    for info in (by_kill, by_queue):
        latecomers.deliver(latecomers.LateSignal(pid=child.pid, tid=0, info=info), pid, None)
    wait_for_turns(child, count, 2)
