"""The directories of /proc, against processes the test starts itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.procfs import auxv, maps, mountinfo, tasks, timens
from godwit.types import OwnedFd, Pid, Tid

ME = Pid(os.getpid())


@pytest.fixture
def child() -> Iterator[Pid]:
    pid = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    yield Pid(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture
def zombie() -> Iterator[Pid]:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield Pid(pid)
    os.waitpid(pid, 0)


@pytest.fixture
def gone() -> Pid:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return Pid(pid)


def test_threads_come_and_go_with_the_listing() -> None:
    started, stop = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        stop.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    assert started.wait(60)
    assert {os.getpid(), thread.native_id} <= set(tasks.list_tids(ME))
    stop.set()
    thread.join()


def test_children_are_found_stopped_or_dead(child: Pid, zombie: Pid) -> None:
    assert {child, zombie} <= set(tasks.children(ME))
    assert tasks.children(child) == ()
    assert tasks.children(zombie) == ()


def test_without_children_files_parents_are_asked(tmp_path: Path) -> None:
    tail = "1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1" + " 0" * 32
    for pid, ppid in ((10, 1), (11, 10), (12, 10), (13, 11)):
        (tmp_path / f"{pid}/task/{pid}").mkdir(parents=True)
        (tmp_path / f"{pid}/stat").write_text(f"{pid} (x) S {ppid} {tail}\n", encoding="ascii")
    # As a process that left between the listing and the reading.
    (tmp_path / "99").symlink_to("nowhere")
    assert tasks.children(Pid(10), proc=str(tmp_path)) == (11, 12)


def test_own_descriptors_are_listed_with_their_links(tmp_path: Path) -> None:
    path = tmp_path / "a b\n"
    with OwnedFd(os.open(path, os.O_CREAT | os.O_RDWR, 0o600)) as file:
        assert tasks.open_fds(ME)[file.number] == str(path)


def test_own_namespaces_are_those_of_the_links() -> None:
    found = tasks.namespaces(ME)
    assert {"mnt", "net", "pid", "user", "pid_for_children"} <= found.keys()
    assert str(Path("/proc/self/ns/net").readlink()) == f"net:[{found['net']}]"


def test_a_zombie_holds_nothing_and_is_still_there(zombie: Pid) -> None:
    assert zombie in tasks.list_pids()
    assert tasks.list_tids(zombie) == (Tid(zombie),)
    assert tasks.open_fds(zombie) == {}
    assert maps.read_maps(zombie) == ()
    assert "net" not in tasks.namespaces(zombie)
    for read in (mountinfo.read, timens.read, auxv.read):
        with pytest.raises(ProcessLookupError):
            read(zombie)


def test_a_process_that_is_gone_is_a_lookup_error(gone: Pid) -> None:
    for read in (tasks.list_tids, tasks.children, tasks.open_fds, tasks.namespaces, maps.read_smaps):
        with pytest.raises(ProcessLookupError):
            read(gone)
