"""Trees that never stand still are frozen and thawed, and nobody in them is the worse for it."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from godwit.engine import freeze
from godwit.errors import BusyError, NoProcessError
from godwit.tracee import calls
from godwit.types import Pid
from tests.conftest import requires
from tests.kernel import stateful as tools
from tests.kernel.stateful import Stateful
from tests.kernel.test_injection import apart

pytestmark = requires("root", "command:cc")

STORMS = ("vforks", "execs", "ending_threads", "forks", "stops")
STILL = ("pending_signals", "urg_blocked", "urg_pending", "stopped_child", "robust_mutex", "critical_section")
TIMES = 25


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.compiled(tmp_path_factory.mktemp("stateful"))


def in_a_child(work: Callable[[], None], directory: Path) -> None:
    """Trace from a process of its own, and fail with its words."""
    told = directory / "complaint"

    def telling() -> None:
        try:
            work()
        except BaseException:
            told.write_text(traceback.format_exc())
            raise

    status = apart(telling)
    assert status == 0, told.read_text() if told.exists() else f"wait status {status}"


def freeze_once(pid: int, *, inject: bool) -> bool:
    """Freeze a tree for a moment; return False when it could not be stopped just now."""
    try:
        with freeze.frozen(Pid(pid)) as tree:
            for task in tree.threads() if inject else ():
                with calls.opened(task) as workshop:
                    assert workshop.call(task, "gettid") > 0
                task.restore()
    except BusyError:
        return False
    return True


def freeze_often(pid: int, *, inject: bool) -> None:
    frozen = 0
    for _ in range(TIMES):
        frozen += freeze_once(pid, inject=inject)
        # It runs for a while, another one each time.
        select.select([], [], [], frozen % 7 / 1000)
    assert frozen, "it could never be stopped"


@pytest.mark.parametrize("mode", STORMS)
def test_a_storm_goes_on_after_every_freeze(program: Path, tmp_path: Path, mode: str) -> None:
    with tools.stateful(program, tmp_path, mode) as running:
        in_a_child(lambda: freeze_often(running.pid, inject=False), tmp_path)
        assert running.verdict() == "ok"


@pytest.mark.parametrize("mode", STORMS)
def test_a_storm_can_be_written_down_and_goes_on(program: Path, tmp_path: Path, mode: str) -> None:
    with tools.stateful(program, tmp_path, mode) as running:
        for turn in range(3):
            status, said, complaints = tools.asked(
                tmp_path, "checkpoint", str(running.pid), tmp_path / f"image{turn}", "leave-running"
            )
            # What shares memory for a moment may do so at every look: that is said, and nothing else.
            error = said.get("error", {})
            assert not status or error["class"] in {"BusyError", "RefusedError"}, (said, complaints)
        assert running.verdict() == "ok"


@pytest.mark.parametrize("mode", STILL)
def test_injected_calls_leave_all_as_it_was(program: Path, tmp_path: Path, mode: str) -> None:
    with tools.stateful(program, tmp_path, mode) as running:
        in_a_child(lambda: freeze_often(running.pid, inject=True), tmp_path)
        assert running.verdict() == "ok"


def freeze_until_it_ends(running: Stateful) -> None:
    """Never leave it a quarter of its timeout in peace."""
    deadline = time.monotonic() + 20
    # It may end between two looks.
    with contextlib.suppress(NoProcessError):
        while not running.read("verdict"):
            assert time.monotonic() < deadline, "the wait begins anew at every freeze"
            freeze_once(running.pid, inject=False)
            select.select([], [], [], 0.3)


def test_a_wait_for_events_keeps_its_remaining_time(program: Path, tmp_path: Path) -> None:
    """It waits 1.5 s in all, never less: frozen again and again it must still come to an end."""
    with tools.stateful(program, tmp_path, "epoll_timeout") as running:
        in_a_child(lambda: freeze_until_it_ends(running), tmp_path)
        assert running.verdict() == "ok"


ASKS_FOR_RANDOM = """
import os, sys
wanted = int(sys.argv[1])
while not os.path.exists("stop"):
    got = os.getrandom(wanted)
    if len(got) != wanted or any(got[at:at + 64] == bytes(64) for at in range(0, wanted, 64)):
        sys.exit(f"asked for {wanted} bytes, got {len(got)}")
    print(".", flush=True)
"""


@pytest.mark.parametrize("wanted", [3 * 4096 + 5, 1 << 19])
def test_a_call_for_random_bytes_gives_all_of_them(tmp_path: Path, wanted: int) -> None:
    words = [sys.executable, "-c", ASKS_FOR_RANDOM, str(wanted)]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b".\n"
            reader = threading.Thread(target=process.stdout.read)
            reader.start()
            in_a_child(lambda: freeze_often(process.pid, inject=False), tmp_path)
            (tmp_path / "stop").touch()
            reader.join()
            assert process.wait() == 0, process.stderr.read() if process.stderr else b""
        finally:
            process.kill()
