"""A deputy is, for all who look at it from home, the process that has left."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from godwit.procfs import stat, status, tasks
from godwit.residual import deputy
from godwit.types import Fd, Pid, Tid
from tests.conftest import requires
from tests.kernel import deputies
from tests.kernel.deputies import Keeping, program, state, turned, until

pytestmark = requires("root")

SLEEPS = "import signal; print('ready', flush=True)\nwhile True: signal.pause()"
# Catches nothing, ignores a few, blocks a few.
MOODY = """
import signal
for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGWINCH})
print('ready', flush=True)
while True: signal.pause()
"""


def waited(pid: int, options: int = os.WUNTRACED | os.WCONTINUED) -> int:
    """Return the next wait status of a child, in time."""

    def once() -> tuple[int, int] | None:
        found = os.waitpid(pid, options | os.WNOHANG)
        return found if found[0] else None

    return until(once, "a wait status")[1]


def test_the_parent_sees_every_kind_of_end() -> None:
    for command, number, seen in (("exit", 7, 7 << 8), ("die", 11, 11), ("die", 9, 9), ("die", 34, 34)):
        with program(SLEEPS) as child, Keeping() as keeper:
            keeper.adopt(turned(child.pid)[child.pid])
            keeper.ask(command, child.pid, number)
            assert keeper.next("Ended")["status"] == seen
            assert waited(child.pid) == seen


def test_the_parent_sees_it_stopped_and_continued() -> None:
    with program(SLEEPS) as child, Keeping() as keeper:
        keeper.adopt(turned(child.pid)[child.pid])
        for number in (19, 20, 21, 22):
            keeper.ask("stop", child.pid, number)
            told = waited(child.pid)
            assert os.WIFSTOPPED(told)
            assert os.WSTOPSIG(told) == number
            assert keeper.next("Stopped")["signal"] == number
            assert state(child.pid) == "t"
            keeper.ask("cont", child.pid)
            assert os.WIFCONTINUED(waited(child.pid))
            keeper.next("Continued")
        os.kill(child.pid, signal.SIGUSR1)
        assert keeper.next("Signal")["signo"] == signal.SIGUSR1, "our own SIGCONT was told"


def test_home_stops_and_continues_it() -> None:
    with program(SLEEPS) as child, Keeping() as keeper:
        keeper.adopt(turned(child.pid)[child.pid])
        for _ in range(20):
            os.kill(child.pid, signal.SIGSTOP)
            assert keeper.next("Signal")["signo"] == signal.SIGSTOP
            assert keeper.next("Stopped")["signal"] == signal.SIGSTOP
            assert os.WIFSTOPPED(waited(child.pid))
            os.kill(child.pid, signal.SIGTERM)
            os.kill(child.pid, signal.SIGCONT)
            keeper.next("Continued")
            assert os.WIFCONTINUED(waited(child.pid))
            assert {keeper.next("Signal")["signo"] for _ in range(2)} == {signal.SIGTERM, signal.SIGCONT}
        os.kill(child.pid, signal.SIGKILL)
        assert keeper.next("Ended")["status"] == signal.SIGKILL


@pytest.mark.parametrize("text", [SLEEPS, MOODY], ids=["plain", "moody"])
def test_every_signal_is_told_with_its_sender(text: str) -> None:
    numbers = [n for n in range(1, 65) if n not in (9, 19, 32, 33)]
    with program(text) as child, Keeping() as keeper:
        keeper.adopt(turned(child.pid)[child.pid])
        for number in numbers:
            os.kill(child.pid, number)
            told = keeper.next("Signal")
            info = bytes.fromhex(told["info"])
            assert struct.unpack_from("<iiiiiI", info)[0::2] == (number, 0, os.getpid())
            assert told["signo"] == number
        assert state(child.pid) in "St"


def look(pid: int) -> dict[str, object]:
    """Return all that others can see of a process and that is to stay."""
    found: dict[str, object] = {}
    for name in ("cmdline", "environ", "comm", "oom_score_adj", "cgroup", "limits", "sessionid"):
        found[name] = Path(f"/proc/{pid}/{name}").read_bytes()
    for name in ("cwd", "root", "ns/mnt", "ns/pid"):
        found[name] = os.readlink(f"/proc/{pid}/{name}")
    of, its = stat.read(Pid(pid)), status.read(Pid(pid))
    for name in ("ppid", "pgrp", "session", "tty_nr", "nice", "starttime", "policy"):
        found[name] = getattr(of, name)
    for name in ("umask", "uids", "gids", "groups", "cap_eff", "cap_prm", "cap_bnd", "cpus_allowed"):
        found[name] = getattr(its, name)
    found["ps"] = subprocess.run(
        ["ps", "-o", "pid,ppid,user,nice,tty,comm,args", "-p", str(pid)], capture_output=True, check=True
    ).stdout
    return found


DRESSED = """
import ctypes, os, resource, signal, sys
os.chdir('/usr'); os.umask(0o27); os.nice(3)
resource.setrlimit(resource.RLIMIT_NOFILE, (99, 200))
open('/proc/self/oom_score_adj', 'w').write('77')
open('/proc/self/comm', 'w').write('odd (na)me\\n')
os.sched_setaffinity(0, {0})
print('ready', flush=True)
while True: signal.pause()
"""


def test_it_looks_the_same() -> None:
    with program(DRESSED, "an argument", "", "ünd", env={**os.environ, "LONG": "x" * 50_000}) as child:
        before, files = look(child.pid), tasks.open_fds(Pid(child.pid))
        known = turned(child.pid)[child.pid]
        assert look(child.pid) == before
        after = tasks.open_fds(Pid(child.pid))
        for own in (known.reports, known.writer):
            assert after.pop(Fd(own)).startswith("socket:")
        assert after == files
        assert status.read(child.pid).vm_rss_bytes < (32 << 10) + 50_000


def test_descriptors_closed_on_exec_stay() -> None:
    text = "import os\nfor n in range(40, 60): os.dup2(0, n, n % 2)\n" + SLEEPS
    with program(text) as child:
        files = tasks.open_fds(Pid(child.pid))
        known = turned(child.pid)[child.pid]
        assert set(tasks.open_fds(Pid(child.pid))) == set(files) | {known.reports, known.writer}
        assert [fd for fd in known.close_on_exec if fd >= 40] == list(range(40, 60, 2))


LOCKS = """
import fcntl, os, struct, sys, threading
files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in sys.argv[1:]]
fcntl.lockf(files[0], fcntl.LOCK_EX)
fcntl.flock(files[1], fcntl.LOCK_EX)
fcntl.fcntl(files[2], 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0))  # F_OFD_SETLK
for _ in range(3): threading.Thread(target=threading.Event().wait, daemon=True).start()
"""


def locked(path: Path, way: str) -> bool:
    """Tell whether somebody else holds a lock."""
    fd = os.open(path, os.O_RDWR)
    try:
        if way == "posix":
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif way == "flock":
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_locks_stay_until_the_descriptor_is_closed(tmp_path: Path) -> None:
    paths = {way: tmp_path / way for way in ("posix", "flock", "ofd")}
    with program(LOCKS + SLEEPS, *map(str, paths.values())) as child, Keeping() as keeper:
        known = turned(child.pid)[child.pid]
        assert all(locked(path, way) for way, path in paths.items())
        keeper.adopt(known)
        for fd, target in tasks.open_fds(Pid(child.pid)).items():
            if target.startswith(str(tmp_path)):
                keeper.ask("close_fd", child.pid, fd)
        assert not any(locked(path, way) for way, path in paths.items())


TREE = """
import os, signal, sys
def leaf():
    while True: signal.pause()
kids = []
for n in range(3):
    pid = os.fork()
    if pid == 0: leaf()
    kids.append(pid)
zombie = os.fork()
if zombie == 0: os._exit(5)
os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
print(*kids, zombie, flush=True)
while True: signal.pause()
"""


def test_a_tree_keeps_its_shape_and_its_dead() -> None:
    with program(TREE) as child, Keeping() as keeper:
        *kids, zombie = map(int, child.first.split())
        known = turned(child.pid)
        assert set(known) == {child.pid, *kids}
        keeper.adopt(*known.values())
        assert [stat.read(Pid(kid)).ppid for kid in (*kids, zombie)] == [child.pid] * 4
        assert state(zombie) == "Z"
        keeper.ask("exit", kids[0], 3)
        # Python took SIGCHLD by default: nobody but the program's own waitpid(2) reaps.
        told = keeper.next("Signal", child.pid)
        assert told["signo"] == signal.SIGCHLD
        assert struct.unpack_from("<iiiiiii", bytes.fromhex(told["info"]))[4] == kids[0]
        for pid, code in ((kids[0], 3), (zombie, 5)):
            assert keeper.call(child.pid, "wait4", pid, bytes(4), os.WNOHANG, 0) == (
                pid,
                [struct.pack("<i", code << 8)],
            )
        # Its children go to init, not to us.
        for kid in kids[1:]:
            keeper.ask("die", kid, 9)


def test_calls_are_made_in_it() -> None:
    with program(SLEEPS) as child, Keeping() as keeper:
        keeper.adopt(turned(child.pid)[child.pid])
        for _ in range(50):
            assert keeper.call(child.pid, "getpid") == (child.pid, [])
        result, (where,) = keeper.call(child.pid, "getcwd", bytes(200), 200)
        assert where[: result - 1].decode() == os.getcwd()
        with pytest.raises(AssertionError, match="ProcessLookupError"):
            keeper.call(child.pid, "kill", 2**22, 0)
        # Also one that job control has stopped, and it stays so.
        os.kill(child.pid, signal.SIGSTOP)
        keeper.next("Stopped")
        waited(child.pid)
        for _ in range(50):
            assert keeper.call(child.pid, "getpid") == (child.pid, [])
        assert state(child.pid) == "t"
        assert os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED) == (0, 0)
        os.kill(child.pid, signal.SIGCONT)
        keeper.next("Continued")
        assert keeper.next("Signal")["signo"] == signal.SIGSTOP
        assert keeper.next("Signal")["signo"] == signal.SIGCONT
        os.kill(child.pid, signal.SIGHUP)
        assert keeper.next("Signal")["signo"] == signal.SIGHUP


def test_a_stopped_job_stays_stopped() -> None:
    with program(SLEEPS) as child:
        os.kill(child.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(waited(child.pid))
        known = turned(child.pid)[child.pid]
        until(lambda: state(child.pid) == "T", "it is stopped again")
        with Keeping() as keeper:
            keeper.adopt(known)
            keeper.next("Stopped")
            os.kill(child.pid, signal.SIGCONT)
            keeper.next("Continued")
            assert keeper.next("Signal")["signo"] == signal.SIGCONT


def test_a_stranger_is_not_adopted() -> None:
    with program(SLEEPS) as child, program(SLEEPS) as other, Keeping() as keeper:
        known = turned(child.pid)[child.pid]
        theirs = turned(other.pid)[other.pid]
        wrongs: tuple[dict[str, object], ...] = (
            {"cookie": "00" * 16},
            {"pid": other.pid},
            {"pid": os.getpid()},
            {"starttime": 1},
            {"boot_id": "x"},
        )
        for wrong in wrongs:
            with pytest.raises(AssertionError, match="NoProcessError"):
                keeper.adopt(deputies.unpacked({**deputies.packed(known), **wrong}))
        keeper.adopt(known, theirs)


CAPSET = "ctypes.CDLL(None).syscall(126, struct.pack('<Ii', 0x20080522, 0), struct.pack('<6I', *{}))\n"


@pytest.mark.parametrize(
    "standing",
    [
        CAPSET.format((0,) * 6),
        "os.setresuid(1000, 1000, 0)\n",
        "os.setresuid(0, 1000, 0)\n",
        "ctypes.CDLL(None).prctl(8, 1)\nos.setresuid(1000, 1000, 1000)\n"
        + CAPSET.format((0x2000, 0x2000, 0, 0, 0, 0)),
        "os.setgroups([5])\nos.setresgid(1000, 1000, 1000)\nos.setresuid(1000, 1000, 1000)\n",
    ],
    ids=["root without capabilities", "saved root", "real root", "a user with one capability", "a user"],
)
def test_it_may_do_what_the_program_might(standing: str) -> None:
    with program("import ctypes, os, struct\n" + standing + SLEEPS) as child:
        before = status.read_standing(child.pid, Tid(child.pid))
        turned(child.pid)
        assert status.read_standing(child.pid, Tid(child.pid)) == before


def test_a_program_without_room_for_descriptors_is_refused_beforehand() -> None:
    full = "import os, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))\n"
    with program(full + SLEEPS) as child:
        # It has three: one short.
        (refusal,) = deputy.obstacles(child.pid)
        assert "open files" in refusal.what
        with pytest.raises(AssertionError, match="3 more descriptors"):
            turned(child.pid)
    with program(full.replace("5", "6") + SLEEPS) as child:
        assert deputy.obstacles(child.pid) == []
        turned(child.pid)


TITLED = """
import os
place = open('/proc/self/stat').read().rpartition(') ')[2].split()
start, end = int(place[45]), int(place[46])
with open('/proc/self/mem', 'r+b', 0) as memory:
    memory.seek(start)
    memory.write(b'worker: at work'.ljust(end - start + 40, b' ') + b'\\0')
"""


def test_a_title_that_a_program_gave_itself_stays() -> None:
    with program(TITLED + SLEEPS) as child:
        before = look(child.pid)["ps"]
        assert b"worker: at work" in bytes(str(before), "ascii")
        turned(child.pid)
        assert look(child.pid)["ps"] == before
