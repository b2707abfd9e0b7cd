"""What cannot move is refused before it was touched, in the same words by every verb."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from godwit import api
from godwit.errors import (
    AccessError,
    BusyError,
    DestinationError,
    GodwitError,
    NoProcessError,
    RefusedError,
    RequestError,
)
from godwit.linux import ptrace
from godwit.migrate.store import STREAM_NAME
from godwit.types import Tid
from tests.conftest import requires
from tests.kernel import counting as tools
from tests.kernel import holder
from tests.kernel.counting import Counting, Pair, Server

pytestmark = [requires("root", "command:cc")]

PF_KTHREAD = 0x200000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.compiled(tmp_path_factory.mktemp("counter"))


@pytest.fixture
def counter(program: Path, tmp_path: Path) -> Iterator[Counting]:
    with tools.counting(program, tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.make(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Server]:
    with tools.serving(pair.destination) as found:
        yield found


@pytest.fixture
def as_source(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GODWIT_CERTS", "GODWIT_STATE_DIR"):
        monkeypatch.setenv(name, pair.source.environment()[name])


Verb = Callable[[int], object]


def verbs(server: Server, directory: Path) -> dict[str, Verb]:
    return {
        "check": api.inspect,
        "migrate": lambda pid: api.migrate(pid, server.host),
        "checkpoint": lambda pid: api.checkpoint(pid, directory / "image"),
        "checkpoint --leave-running": lambda pid: api.checkpoint(
            pid, directory / "image", leave_running=True
        ),
    }


def expect_everywhere(
    pid: int, error: type[GodwitError], words: str, server: Server, directory: Path
) -> None:
    """See every verb refuse a pid in the same single line."""
    lines = set()
    for verb in verbs(server, directory).values():
        with pytest.raises(error) as caught:
            verb(pid)
        assert type(caught.value) is error
        assert caught.value.remedy
        lines.add(caught.value.line())
    assert len(lines) == 1
    line = lines.pop()
    assert words in line
    assert str(pid) in line
    assert "\n" not in line
    assert not (directory / "image").exists()


@pytest.mark.usefixtures("as_source")
def test_a_pid_that_is_gone(server: Server, tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    expect_everywhere(process.pid, NoProcessError, "no process", server, tmp_path)


def kernel_thread() -> int:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[6]) & PF_KTHREAD:
                return int(path.parts[2])
    return pytest.skip("no kernel thread can be seen here")


@pytest.mark.usefixtures("as_source")
def test_a_kernel_thread(server: Server, tmp_path: Path) -> None:
    expect_everywhere(kernel_thread(), RequestError, "kernel thread", server, tmp_path)


@pytest.mark.usefixtures("as_source")
def test_a_zombie(server: Server, tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        expect_everywhere(process.pid, NoProcessError, "waits to be reaped", server, tmp_path)
    finally:
        process.wait()


@pytest.mark.usefixtures("as_source")
def test_godwit_itself_and_its_parents(server: Server, tmp_path: Path) -> None:
    parent = os.getppid()
    for pid in {os.getpid(), parent} - {0, 1}:
        expect_everywhere(pid, RequestError, "Godwit itself or a parent of it", server, tmp_path)


@requires("command:unshare")
def test_the_first_process_of_a_machine(tmp_path: Path) -> None:
    """In a pid namespace of its own: moving pid 1 would stop whoever asks."""
    script = '"$0" -m tests.kernel.mover checkpoint 1 "$1"; exit $?'
    words = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script]
    done = asked([*words, sys.executable, str(tmp_path / "image")], tmp_path)
    assert done.returncode == RequestError.exit_status, done.stdout + done.stderr
    assert "Godwit itself or a parent of it" in done.stdout


def asked(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end."""
    return subprocess.run(
        words,
        env={**tools.Machine(directory).environment(), "HOME": str(directory)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tools.ROOT,
    )


@contextlib.contextmanager
def traced_by_another(pid: int) -> Iterator[int]:
    """Have a child trace a process, until the end of the block."""
    reading, writing = os.pipe()
    tracer = os.fork()
    if tracer == 0:
        try:
            ptrace.seize(Tid(pid), 0)
            os.write(writing, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"x"
        yield tracer
    finally:
        os.close(reading)
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)


@pytest.mark.usefixtures("as_source")
def test_a_process_that_is_traced_already(counter: Counting, server: Server, tmp_path: Path) -> None:
    with traced_by_another(counter.pid) as tracer:
        expect_everywhere(counter.pid, BusyError, f"traced by pid {tracer}", server, tmp_path)
        untouched(counter.pid, counter, tracer=tracer)
    assert counter.only_copy() == counter.pid


def untouched(pid: int, log: Counting, *, tracer: int = 0) -> None:
    """See that a process runs, is nobody's tracee and goes on counting."""
    text = Path(f"/proc/{pid}/status").read_text()
    assert f"TracerPid:\t{tracer}\n" in text
    assert tools.state_of(pid) in "RSD"
    log.wait_for_progress(5)
    log.check_log()


def as_nobody(pid: int, directory: Path) -> subprocess.CompletedProcess[str]:
    """Ask for a checkpoint as a user without rights."""
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    mover = [sys.executable, "-m", "tests.kernel.mover", "checkpoint", str(pid), str(directory / "image")]
    return asked([*words, *mover], directory)


@requires("command:setpriv")
def test_another_users_process(counter: Counting, tmp_path: Path) -> None:
    done = as_nobody(counter.pid, tmp_path)
    if "Permission denied" in done.stderr:
        pytest.skip("this working tree cannot be read by other users")
    assert done.returncode == AccessError.exit_status, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert "belongs to user 0" in error["line"]
    assert "run as root or as that user" in error["line"]
    untouched(counter.pid, counter)


@dataclass
class Held(Counting):
    """A holder: it counts, and it has what cannot be moved."""


@contextlib.contextmanager
def holding(what: str, directory: Path, *, pass_fds: tuple[int, ...] = (), port: int = 0) -> Iterator[Held]:
    log = directory / f"{what}.log"
    environment = tools.Machine(directory, {"HOLDER_PORT": str(port)}).environment()
    process = subprocess.Popen(
        [sys.executable, holder.__file__, what, log],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=pass_fds,
        env=environment,
        cwd="/",
    )
    held = Held(process, str(log), log)
    try:
        tools.until(lambda: len(held.lines()) > 3 or process.poll() is not None, "the holder counts or ends")
        if process.returncode == holder.NO_SUCH:
            pytest.skip(f"no {what} here")
        yield held
    finally:
        held.end()


def expect_refused(held: Held, words: str, server: Server, directory: Path) -> None:
    """See that check names it, that every verb refuses it in the same words, and that it runs on."""
    found = api.inspect(held.pid)
    named = [each for each in found.refusals if words in each.line()]
    assert named, f"check names {[each.line() for each in found.refusals]}"
    assert not found.movable
    for name, verb in list(verbs(server, directory).items())[1:]:
        with pytest.raises(RefusedError) as caught:
            verb(held.pid)
        assert set(caught.value.refusals) == set(found.refusals), name
        assert caught.value.exit_status == 3
        assert "\n" not in caught.value.line()
        untouched(held.pid, held)
    assert not (directory / "image").exists()
    server.wait_until_idle()
    assert all(each.where.startswith("pid ") for each in named)


REFUSED = {
    "terminal": "terminal",
    "inotify": "inotify",
    "fanotify": "fanotify",
    "io_uring": "io_uring",
    "userfaultfd": "userfaultfd",
    "pidfd": "pidfd",
    "perf": "performance counter",
    "netlink": "netlink socket",
    "packet": "packet socket",
    "proc": "file of /proc",
    "seccomp": "seccomp filter",
    "sysv": "System V shared memory",
    "async": "does not move along",
    "lease": "lease",
    "aio": "asynchronous I/O context",
    "hugetlb": "huge page mapping",
    "thread_with_files": "descriptor table",
    "tracing": "traces",
    "child_in_namespace": "uts namespace",
}


@pytest.mark.usefixtures("as_source")
@pytest.mark.parametrize("what", REFUSED)
def test_what_it_holds_is_refused_by_name(what: str, server: Server, tmp_path: Path) -> None:
    with holding(what, tmp_path) as held:
        expect_refused(held, REFUSED[what], server, tmp_path)


@pytest.mark.usefixtures("as_source")
def test_an_established_tcp_connection(server: Server, tmp_path: Path) -> None:
    with (
        contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener,
        holding("tcp", tmp_path, port=listener.getsockname()[1]) as held,
    ):
        connection, _ = listener.accept()
        with connection:
            expect_refused(held, "TCP", server, tmp_path)
            assert select.select([connection], [], [], 0)[0] == []  # neither data nor an end


def outside_pipe() -> tuple[int, int]:
    return os.pipe()


def outside_unix() -> tuple[int, int]:
    left, right = socket.socketpair()
    return left.detach(), right.detach()


def outside_memory() -> tuple[int, int]:
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 4096)
    return fd, os.dup(fd)


def outside_eventfd() -> tuple[int, int]:
    fd = os.eventfd(0)
    return fd, os.dup(fd)


@pytest.mark.usefixtures("as_source")
@pytest.mark.parametrize("make", [outside_pipe, outside_unix, outside_memory, outside_eventfd])
def test_what_is_shared_with_a_process_outside(
    make: Callable[[], tuple[int, int]], server: Server, tmp_path: Path
) -> None:
    ours, theirs = make()
    with shared_with_another(ours, theirs, tmp_path) as held:
        expect_refused(held, "does not move along", server, tmp_path)


@contextlib.contextmanager
def shared_with_another(ours: int, theirs: int, directory: Path) -> Iterator[Held]:
    """Run a holder of one descriptor while some other process has the other."""
    other = subprocess.Popen(["sleep", "1000"], pass_fds=(ours,))
    try:
        with holding("inherited", directory, pass_fds=(theirs,)) as held:
            os.close(ours)
            os.close(theirs)
            yield held
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("leave_running", [False, True])
@requires("command:unshare")
def test_a_checkpoint_without_space_leaves_the_program_running(
    leave_running: bool, counter: Counting, tmp_path: Path
) -> None:
    place = tmp_path / "tiny"
    place.mkdir()
    words = ["leave-running"] if leave_running else []
    mover = [sys.executable, "-m", "tests.kernel.mover", "tiny", str(place), str(counter.pid)]
    done = asked(["unshare", "--mount", *mover, str(place / "image"), *words], tmp_path)
    assert done.returncode == DestinationError.exit_status, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert "No space left on device" in told["error"]["line"]
    assert str(place / "image" / STREAM_NAME) in told["error"]["line"]
    assert told["left"] == []
    assert counter.only_copy() == counter.pid
    untouched(counter.pid, counter)


@pytest.mark.usefixtures("as_source")
@pytest.mark.parametrize("host", ["tls://127.0.0.1:1", "nowhere", "tls://127.0.0.1:notaport"])
def test_a_destination_that_is_not_there(host: str, counter: Counting) -> None:
    with pytest.raises((DestinationError, RequestError)) as caught:
        api.migrate(counter.pid, host)
    assert caught.value.remedy
    assert "\n" not in caught.value.line()
    untouched(counter.pid, counter)
    assert counter.only_copy() == counter.pid


def test_a_destination_of_another_authority(
    counter: Counting, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Pair.make(tmp_path)
    for name in ("GODWIT_CERTS", "GODWIT_STATE_DIR"):
        monkeypatch.setenv(name, stranger.source.environment()[name])
    with pytest.raises(AccessError) as caught:
        api.migrate(counter.pid, server.host)
    assert caught.value.remedy
    assert "\n" not in caught.value.line()
    server.wait_until_idle()
    assert counter.only_copy() == counter.pid
