"""The workloads are the judges of everything else: here each is seen to acquit and to convict."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.workloads.driver import WORKLOADS, Running, WorkloadError, processes_in, wait_until
from tests.workloads.redis_driver import Client, RedisRunning, connect_here, start

SMALL = {
    "numpy_py": ("mib=16",),
    "calls_c": ("hold_ms=100",),
    "memory_c": ("answer_ms=1000",),
    "spaces_c": ("sparse_gib=1",),
}
MARKER = bytes((index * 37 + 11) & 255 for index in range(16))
CHUNK = 16 << 20
PAGE = 4096

Run = Callable[..., Running]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start workloads that cannot outlive the test."""
    started: list[Running] = []

    def start_one(name: str, *options: str) -> Running:
        reason = WORKLOADS[name].available()
        if reason is not None:
            pytest.skip(reason)
        directory = tmp_path / f"{name}{len(started)}"
        directory.mkdir()
        try:
            running = start(name, directory, options=(*SMALL.get(name, ()), *options))
        except BaseException:
            signal_all(processes_in(directory), signal.SIGKILL)
            raise
        started.append(running)
        return running

    yield start_one
    for running in started:
        running.kill()


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_unmoved_workload_finds_itself_in_order(run: Run, name: str) -> None:
    running = run(name)
    running.wait_alive()
    running.wait_alive(more=20)
    verdict = running.finish()
    assert verdict.ok, verdict.text
    assert wait_until(lambda: not processes_in(running.dir), 20), "processes are left behind"
    assert isinstance(running.handle, subprocess.Popen)
    assert running.handle.wait() == 0
    assert (running.dir / "stderr").read_text().replace("Terminated\n", "") == ""


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "redis"])
def test_a_workload_has_a_session_and_nothing_of_its_starter(run: Run, name: str) -> None:
    running = run(name)
    pid = running.pid()
    running.wait_alive()
    assert (os.getsid(pid), os.getpgid(pid)) == (pid, pid)
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
    # A shell that reads from its clock lends it descriptor 0 for as long.
    assert links[0] in ("/dev/null", str(running.dir / "ticks"))
    assert links[1:] == [str(running.dir / "stdout"), str(running.dir / "stderr")]


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "calls_c"])
def test_a_workload_that_was_only_stopped_acquits(run: Run, name: str) -> None:
    running = run(name)
    for _ in range(3):
        running.wait_alive()
        pids = processes_in(running.dir)
        signal_all(pids, signal.SIGSTOP)
        for pid in pids:
            assert wait_until(partial(is_stopped, pid), 10)
        signal_all(pids, signal.SIGCONT)
    running.wait_alive(more=10)
    verdict = running.finish()
    assert verdict.ok, verdict.text


def signal_all(pids: list[int], number: int) -> None:
    """Send a signal to those that are still there: some workloads start short-lived programs."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_stopped(pid: int) -> bool:
    """Tell whether a process stands still, as stopped ones and those just gone do."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        return state in "TZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_sqlite_with_a_write_ahead_log_finds_itself_in_order(run: Run) -> None:
    running = run("sqlite_py", "journal=wal")
    running.wait_alive(more=50)
    verdict = running.finish()
    assert verdict.ok, verdict.text


# What follows spoils a running workload from outside. Each must say what it noticed.


def writable_ranges(pid: int) -> Iterator[tuple[int, int]]:
    """Address ranges that the process may write."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        if permissions.startswith("rw"):
            start_text, end_text = span.split("-")
            yield int(start_text, 16), int(end_text, 16)


def flip_memory(running: Running) -> None:
    """Change one bit behind each marker in memory."""
    found = 0
    pid = running.pid()
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for low, high in writable_ranges(pid):
            for chunk in range(low, high, CHUNK):
                try:
                    content = os.pread(memory.fileno(), min(CHUNK, high - chunk), chunk)
                except OSError:
                    continue
                for match in re.finditer(re.escape(MARKER), content):
                    place = chunk + match.end()
                    # Some programs unmap memory all the time.
                    with contextlib.suppress(OSError):
                        byte = os.pread(memory.fileno(), 1, place) if place < high else b""
                        if not byte:
                            continue
                        found += os.pwrite(memory.fileno(), bytes([byte[0] ^ 0x40]), place)
    assert found > 0, "no marker in memory"


def marked_pages(pid: int) -> dict[int, bytes]:
    """The content of each page that has the marker where the pages of `pages.h` have it, by address."""
    pages: dict[int, bytes] = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for low, high in writable_ranges(pid):
            for chunk in range(low, high, CHUNK):
                with contextlib.suppress(OSError):
                    content = os.pread(memory.fileno(), min(CHUNK, high - chunk), chunk)
                    for match in re.finditer(re.escape(MARKER), content):
                        start = match.start() - len(MARKER)
                        if start % PAGE == 0:
                            pages[chunk + start] = content[start : start + PAGE]
    return pages


def bring_back_old_pages(running: Running) -> None:
    """What a copy that has missed a write does: each page is whole and in its place, and an old one."""
    pid = running.pid()
    old = marked_pages(pid)
    running.wait_alive(more=10)
    brought_back = 0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for address, content in old.items():
            with contextlib.suppress(OSError):
                if os.pread(memory.fileno(), PAGE, address) != content:
                    brought_back += os.pwrite(memory.fileno(), content, address)
    assert brought_back > 0, "no page was rewritten"


def stop_and_continue(running: Running) -> None:
    """What a careless tracer does: epoll_wait and sigtimedwait return EINTR after it."""
    pid = running.pid()
    os.kill(pid, signal.SIGSTOP)
    assert wait_until(lambda: is_stopped(pid), 10)
    os.kill(pid, signal.SIGCONT)


def stolen_fd(running: Running, suffix: str) -> int:
    """A duplicate of the program's descriptor that shows a file of this name."""
    pid = running.pid()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).endswith(suffix):
            pidfd = os.pidfd_open(pid)
            try:
                return pidfd_getfd(pidfd, int(entry.name))
            finally:
                os.close(pidfd)
    raise AssertionError(f"no descriptor of {suffix}")


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2), made here so that this test leans on nothing it helps to test."""
    import ctypes

    gave = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, number, 0)
    assert gave >= 0, os.strerror(ctypes.get_errno())
    return int(gave)


def move_offset(running: Running) -> None:
    """Move the offset of a shared open file description."""
    fd = stolen_fd(running, "/offset")
    os.lseek(fd, 1, os.SEEK_CUR)
    os.close(fd)


def lengthen_ghost(running: Running) -> None:
    """Add a byte to a deleted file."""
    fd = stolen_fd(running, "/ghost (deleted)")
    os.write(fd, b"x")
    os.close(fd)


def fill_holes(running: Running) -> None:
    """Write into memfds wherever they are empty."""
    fd = stolen_fd(running, "/memfd:truncated (deleted)")
    for place in range(0, os.fstat(fd).st_size, PAGE):
        if not any(os.pread(fd, PAGE, place)):
            os.pwrite(fd, b"x", place)
    os.close(fd)


def double_event(running: Running) -> None:
    """Add to the counter of every eventfd."""
    fd = stolen_fd(running, "[eventfd]")
    os.write(fd, (1).to_bytes(8, "little"))
    os.close(fd)


def send_signal(running: Running) -> None:
    """One signal too many."""
    os.kill(running.pid(), signal.SIGUSR2)


def double_log_line(running: Running) -> None:
    """What a second copy of the program would do."""
    log = running.dir / "log"
    with log.open("r+b") as file:
        file.seek(21)
        file.write(b"%020d\n" % 1)


def append_line(running: Running) -> None:
    """A line that the program did not write."""
    with (running.dir / ("chain" if running.workload.name == "node_js" else "appended")).open("a") as file:
        file.write("7 lost\n")


def change_row(running: Running) -> None:
    """Money from nowhere."""
    with closing(sqlite3.connect(running.dir / "data.db", timeout=30)) as database, database:
        database.execute("UPDATE account SET amount = amount + 1 WHERE id = 3")


def children_of(pid: int) -> list[int]:
    """Pids of the children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_child(running: Running) -> None:
    """Kill a child that is alive."""
    for pid in children_of(running.pid()):
        if ") Z " not in Path(f"/proc/{pid}/stat").read_text():
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError("no child")


def kill_gzip(running: Running) -> None:
    """Break the pipeline in the middle."""
    for pid in children_of(running.pid()):
        if "(gzip)" in Path(f"/proc/{pid}/stat").read_text():
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError("no gzip")


def set_key(running: Running) -> None:
    """One increment that nobody asked for."""
    port = running.port if isinstance(running, RedisRunning) else int((running.dir / "port").read_text())
    with closing(Client(connect_here(port))) as client:
        client.ask("INCR", "turns")


SABOTAGE: tuple[tuple[str, Callable[[Running], None], str], ...] = (
    ("static_c", flip_memory, "word 0 of generation"),
    ("static_c", double_log_line, "log: line 2 is"),
    ("threads_c", flip_memory, "the bank holds"),
    ("threads_c", double_log_line, "log: line 2 is"),
    ("signals_c", flip_memory, "signals arrived on the altstack"),
    ("signals_c", send_signal, "signals arrived"),
    ("calls_c", flip_memory, "futex timeout: gave"),
    ("calls_c", stop_and_continue, "Interrupted system call"),
    ("memory_c", flip_memory, "word 2 is"),
    ("memory_c", kill_child, "the other one does not answer"),
    ("fds_c", move_offset, "lseek"),
    ("fds_c", lengthen_ghost, "st_size gave"),
    ("fds_c", double_event, "eventfd|semaphore|counter|epoll"),
    ("fds_c", kill_child, "Broken pipe|talk|read"),
    ("mapper_c", flip_memory, "of key|do not have their sum"),
    ("mapper_c", bring_back_old_pages, "word 0 of key"),
    ("writer_c", flip_memory, "word 4 of key"),
    ("writer_c", bring_back_old_pages, "word 0 of key"),
    ("writer_c", double_log_line, "log: line 2 is"),
    ("forker_c", flip_memory, "word 4 of key"),
    ("forker_c", bring_back_old_pages, "word 0 of key"),
    ("forker_c", kill_child, "child .* ended with status 9"),
    ("threader_c", flip_memory, "turns, .* of the twin|word 4 of key"),
    ("truncator_c", flip_memory, "word 4 of key"),
    ("truncator_c", bring_back_old_pages, "word 0 of key"),
    ("truncator_c", fill_holes, "should be 0"),
    ("truncator_c", kill_child, "does not answer|Broken pipe"),
    ("kernelio_c", flip_memory, "word 4 of key"),
    ("kernelio_c", bring_back_old_pages, "word 0 of key"),
    ("kernelio_c", kill_child, "Broken pipe"),
    ("tree_py", kill_child, "BrokenPipeError|proc|No such process|does not answer"),
    ("tree_sh", kill_child, "is in state Z|is gone|the clock left another status"),
    # The bit may also flip in what is on its way to the child.
    ("numpy_py", flip_memory, "block 0 sums to|the child said"),
    ("numpy_py", kill_child, "BrokenPipe|the child said"),
    ("log_py", append_line, "appended"),
    ("log_py", double_log_line, "log: line 2 is"),
    ("sqlite_py", change_row, "the accounts hold"),
    ("node_js", flip_memory, "byte 16 of the state"),
    ("node_js", append_line, "of the chain is|the chain has"),
    ("java", flip_memory, "byte 16 of the state"),
    ("java_default", double_log_line, "log: line 2 is"),
    ("go_static", flip_memory, "byte 16 of the state"),
    ("pipeline_sh", kill_gzip, "exit statuses"),
    ("spaces_c", flip_memory, "word 4 of key"),
    ("spaces_c", bring_back_old_pages, "word 0 of key"),
    ("redis_py", set_key, "the server said"),
    ("redis_py", kill_child, "the server ended"),
    ("redis", set_key, "the server said 4, not 3|the server said"),
)


@pytest.mark.parametrize(
    ("name", "spoil", "reason"), SABOTAGE, ids=[f"{name}-{spoil.__name__}" for name, spoil, _ in SABOTAGE]
)
def test_a_spoilt_workload_says_what_it_noticed(
    run: Run, name: str, spoil: Callable[[Running], None], reason: str
) -> None:
    running = run(name)
    running.wait_alive()
    spoil(running)
    with contextlib.suppress(WorkloadError):
        running.wait_alive(5, more=30)  # Some notice in the middle of their work, others when they look back.
    verdict = running.finish(20)
    assert not verdict.ok, verdict.text
    assert re.search(reason, verdict.text), verdict.text


def test_every_workload_is_spoilt_at_least_once() -> None:
    assert {name for name, _, _ in SABOTAGE} == set(WORKLOADS)
