"""Programs at home and at the host use the same files at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.linux.pause import pause
from tests.kernel.homefiles import Served, served
from tests.kernel.homefiles_cases import USER, as_user, forked, look, seen

# Threads act as others, which marks the whole process (PR_SET_DUMPABLE): not among the everyday tests.
pytestmark = [pytest.mark.requires("root"), pytest.mark.slow]

DEADLINE_S = 20.0
TTL_S = 1.0


@pytest.fixture(params=["direct", "socket"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "home").mkdir()
    with served(tmp_path / "home", tmp_path / "mnt", request.param) as found:
        yield found


def wait_for(condition: Callable[[], object], what: str) -> None:
    for _ in range(int(DEADLINE_S / 0.01)):
        if condition():
            return
        pause(0.01)
    pytest.fail(f"waited in vain: {what}")


def test_lines_appended_from_both_sides_are_all_there(tree: Served) -> None:
    home = os.open(tree.home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    host = os.open(tree.host / "log", os.O_RDWR | os.O_APPEND)
    expected = b""
    for at in range(50):
        line = b"line %d of some length\n" % at
        os.write(home if at % 2 else host, line)
        expected += line
    assert (tree.home / "log").read_bytes() == expected
    assert (tree.host / "log").read_bytes() == expected
    wait_for(lambda: os.pread(host, 10000, 0) == expected, "the open file has everything")
    os.close(home)
    os.close(host)


def test_what_home_writes_is_read_at_the_host(tree: Served) -> None:
    (tree.home / "a").write_bytes(b"old")
    with open(tree.host / "a", "rb", buffering=0) as file:
        assert file.read() == b"old"
        (tree.home / "a").write_bytes(b"new and longer")
        wait_for(lambda: os.pread(file.fileno(), 100, 0) == b"new and longer", "the new content")
    (tree.home / "b").write_bytes(b"b")
    assert (tree.host / "b").read_bytes() == b"b"
    (tree.home / "a").unlink()
    wait_for(lambda: not (tree.host / "a").exists(), "the name is gone")


def test_a_file_removed_at_home_is_still_open_at_the_host(tree: Served) -> None:
    (tree.home / "a").write_bytes(b"content")
    fd = os.open(tree.host / "a", os.O_RDWR)
    (tree.home / "a").unlink()
    os.pwrite(fd, b"CON", 0)
    assert os.pread(fd, 100, 0) == b"CONtent"
    assert os.fstat(fd).st_size == 7
    os.close(fd)


def test_a_mapping_shows_in_the_file_at_home(tree: Served) -> None:
    (tree.home / "a").write_bytes(bytes(8192))
    with open(tree.host / "a", "r+b") as file, mmap.mmap(file.fileno(), 8192) as memory:
        memory[4096:4100] = b"here"
        memory.flush()
        assert (tree.home / "a").read_bytes()[4096:4100] == b"here"


@pytest.mark.parametrize("sides", ["home locks", "host locks"])
def test_locks_exclude_the_other_side(tree: Served, sides: str) -> None:
    (tree.home / "a").write_bytes(b"x" * 100)
    holder, asker = (tree.home, tree.host) if sides == "home locks" else (tree.host, tree.home)
    with open(holder / "a", "r+b") as held, open(asker / "a", "r+b") as asked:
        fcntl.lockf(held, fcntl.LOCK_EX, 10, 20)

        def other() -> object:
            result = [seen(fcntl.lockf, asked, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 25)]
            return [*result, seen(fcntl.lockf, asked, fcntl.LOCK_EX | fcntl.LOCK_NB, 20, 0)]

        assert forked(other) == ["EAGAIN", None]
        fcntl.flock(held, fcntl.LOCK_EX)
        assert seen(fcntl.flock, asked, fcntl.LOCK_SH | fcntl.LOCK_NB) == "EAGAIN"
        fcntl.flock(held, fcntl.LOCK_UN)
        fcntl.flock(asked, fcntl.LOCK_EX | fcntl.LOCK_NB)


WAITER = """
import fcntl, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
file = open(sys.argv[1], "r+b")
lock = {"record": fcntl.lockf, "whole": fcntl.flock}[sys.argv[2]]
print("waiting", flush=True)
try:
    lock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@contextlib.contextmanager
def waiter(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    command = ["/usr/bin/python3", "-c", WAITER, str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            wait_for(lambda: state_of(process.pid) == "S", "it waits for the lock")
            yield process
        finally:
            process.kill()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("kind", ["record", "whole"])
def test_who_waits_for_a_lock_gets_it(tree: Served, kind: str) -> None:
    (tree.home / "a").write_bytes(b"x")
    with open(tree.home / "a", "r+b") as held:
        lock = {"record": fcntl.lockf, "whole": fcntl.flock}[kind]
        lock(held, fcntl.LOCK_EX)
        with waiter(tree.host / "a", kind) as process:
            # Meanwhile everybody else is served.
            (tree.host / "b").write_bytes(b"b")
            lock(held, fcntl.LOCK_UN)
            assert said(process) == "locked\n"
            assert forked(lambda: seen(lock, held, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EAGAIN"
            process.kill()
            process.wait()
            wait_for(
                lambda: forked(lambda: seen(lock, held, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None,
                "the dead program's lock is gone",
            )


@pytest.mark.parametrize("kind", ["record", "whole"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_who_waits_for_a_lock_can_be_interrupted(tree: Served, kind: str, number: signal.Signals) -> None:
    (tree.home / "a").write_bytes(b"x")
    with open(tree.home / "a", "r+b") as held:
        lock = {"record": fcntl.lockf, "whole": fcntl.flock}[kind]
        lock(held, fcntl.LOCK_EX)
        with waiter(tree.host / "a", kind) as process:
            process.send_signal(number)
            if number == signal.SIGUSR1:
                assert said(process) == "interrupted\n"
            process.wait(timeout=DEADLINE_S)
        lock(held, fcntl.LOCK_UN)
        with open(tree.home / "a", "r+b") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_waits_sees_the_end_of_the_connection(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/a").write_bytes(b"x")
    with open(tmp_path / "home/a", "r+b") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        with (
            served(tmp_path / "home", tmp_path / "mnt") as tree,
            waiter(tree.host / "a", "record") as process,
        ):
            fd = os.open(tree.host / "a", os.O_RDONLY)
            # The host's pump ends while somebody waits.
            tree.end()
            assert process.wait(timeout=DEADLINE_S) != 0
            assert seen(os.pread, fd, 1, 0) == "ENOTCONN"
            assert seen(os.close, fd) == "ENOTCONN"


def test_nobody_waits_for_another_ones_fsync(tree: Served) -> None:
    with open(tree.host / "a", "wb", buffering=0) as file:
        done = []

        def sync() -> None:
            for _ in range(20):
                file.write(b"x" * 100000)
                os.fsync(file.fileno())
            done.append(True)

        thread = threading.Thread(target=sync)
        thread.start()
        for number in range(100):
            (tree.host / f"f{number}").write_bytes(b"")
        thread.join()
    assert done == [True]
    assert (tree.home / "a").stat().st_size == 2000000


def test_a_users_job_is_that_user_and_nobody_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o777)
    for name, owner, group, mode in [
        ("open", 0, 0, 0o644),
        ("groups", 0, USER[2][0], 0o640),
        ("secret", 0, 0, 0o600),
        ("other", 777, 777, 0o600),
    ]:
        (home / name).write_bytes(name.encode())
        (home / name).chmod(mode)
        os.chown(home / name, owner, group)
    who = {"uids": (USER[0],), "gids": (USER[1],), "groups": USER[2]}
    with served(home, tmp_path / "mnt", who=who) as tree:
        # The server has left root's root of the mount to be looked at by nobody but the user.
        directory = os.open(tree.host, os.O_PATH)

        def user() -> object:
            os.fchdir(directory)
            read = [seen(Path(name).read_bytes) for name in ("open", "groups", "secret", "other")]
            Path("made").write_bytes(b"x")
            return [*read, look("made")[2:4]]

        assert as_user(user) == [b"open", b"groups", "EACCES", "EACCES", USER[:2]]

        def another() -> object:
            entered = seen(os.fchdir, directory)
            made = seen(os.open, "new", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
            return [entered, made, seen(os.open, "unknown", os.O_RDONLY, dir_fd=directory)]

        assert as_user(another, (777, 777, ())) == ["EACCES", "EACCES", "EACCES"]
        assert forked(another) == [None, "EACCES", "EACCES"]
        os.close(directory)
    assert not (home / "new").exists()


def test_few_descriptors_are_enough_for_many_files(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "d/e").mkdir(parents=True)
    for number in range(500):
        (home / f"d/e/{number}").write_bytes(b"%d" % number)
    with served(home, tmp_path / "mnt", max_descriptors=16) as tree:
        fds = [os.open(tree.host / f"d/e/{number}", os.O_PATH) for number in range(500)]
        held = [os.readlink(path) for path in Path(f"/proc/{tree.pid}/fd").iterdir() if path.exists()]
        assert sum("/home/d/e/" in link for link in held) <= 16
        numbers = os.open("/proc/self/fd", os.O_PATH)

        def content(number: int) -> bytes:
            fd = os.open(str(fds[number]), os.O_RDONLY, dir_fd=numbers)
            try:
                return os.read(fd, 10)
            finally:
                os.close(fd)

        assert [content(number) for number in range(500)] == [b"%d" % number for number in range(500)]
        os.rename(tree.host / "d/e", tree.host / "moved")
        assert [content(number) for number in range(0, 500, 7)] == [b"%d" % n for n in range(0, 500, 7)]
        for fd in (*fds, numbers):
            os.close(fd)
        # Its inode number may be used again, and its node id not.
        for _ in range(50):
            (tree.host / "x").write_bytes(b"one")
            assert (tree.host / "x").read_bytes() == b"one"
            (tree.host / "x").unlink()


def test_other_file_systems_below_are_part_of_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    (home / "proc").mkdir()
    (home / "ro").mkdir()
    mounts = [("tmpfs", "tmp", "size=1m,nr_inodes=20"), ("proc", "proc", ""), ("tmpfs", "ro", "ro")]
    with served(home, tmp_path / "mnt", mounts=mounts) as tree:
        (tree.host / "tmp/a").write_bytes(b"in tmpfs")
        (tree.host / "a").write_bytes(b"outside")
        assert (tree.host / "tmp/a").read_bytes() == b"in tmpfs"
        assert seen(os.rename, tree.host / "tmp/a", tree.host / "b") == "EXDEV"
        assert seen(os.link, tree.host / "tmp/a", tree.host / "b") == "EXDEV"
        assert seen((tree.host / "tmp/big").write_bytes, b"x" * (2 << 20)) == "ENOSPC"
        assert seen(os.mkdir, tree.host / "ro/d") == "EROFS"
        assert os.listdir(tree.host / "proc") == []
        assert seen(os.stat, tree.host / "proc/self") == "ENOENT"
        assert seen(os.mkdir, tree.host / "proc/x") == "ENOENT"
        assert sorted(os.listdir(tree.host)) == ["a", "proc", "ro", "tmp"]
        assert os.statvfs(tree.host / "tmp").f_files == 20
        assert not (home / "tmp/a").exists()  # it is in the server's own mount namespace
        inodes = {(tree.host / name).stat().st_ino for name in ("a", "tmp/a", "ro", "tmp", ".")}
        assert len(inodes) == 5


def test_an_open_file_without_a_name_is_reached(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    secret = tmp_path / "deleted"
    secret.write_bytes(b"0123456789")
    registered = [(str(secret), os.O_RDWR)]
    with served(tmp_path / "home", tmp_path / "mnt", registered=registered) as tree:
        assert not secret.exists()
        assert os.listdir(tree.host) == []
        path = tree.host / ".godwit-open-files/1"
        fd = os.open(path, os.O_RDWR)
        assert os.read(fd, 4) == b"0123"
        os.pwrite(fd, b"AB", 4)
        assert os.read(fd, 4) == b"AB67"
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 10
        assert os.read(fd, 4) == b""
        assert os.fstat(fd).st_nlink == 0
        os.ftruncate(fd, 6)
        assert path.read_bytes() == b"0123AB"
        with open(path, "r+b") as other:
            # One open file description at home: its lock is not in its own way.
            fcntl.flock(fd, fcntl.LOCK_EX)
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert seen(os.open, tree.host / ".godwit-open-files/2", os.O_RDONLY) == "ENOENT"
        assert seen((tree.host / ".godwit-open-files/new").write_bytes, b"") == "ENOENT"
        os.close(fd)


SQL = """
import sqlite3, sys
side = sqlite3.connect("db", timeout=20, isolation_level=None)
for line in sys.stdin:
    try:
        print(side.execute(line).fetchall(), flush=True)
    except sqlite3.OperationalError as error:
        print(error, flush=True)
"""


@contextlib.contextmanager
def sql(*before: str) -> Iterator[Callable[[str], str]]:
    """Run a program that executes statements: SQLite resolves paths, and must do so at the host."""
    command = [*before, "/usr/bin/python3", "-c", SQL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told, said = process.stdin, process.stdout

        def execute(statement: str) -> str:
            told.write(statement + "\n")
            told.flush()
            return said.readline().strip()

        yield execute
        told.close()


def test_sqlite_works_from_both_sides(tree: Served) -> None:
    with sql(*tree.enter) as host, sql("env", "-C", str(tree.home)) as home:
        assert host("create table t (side, n)") == "[]"
        for number in range(20):
            assert host(f"insert into t values ('host', {number})") == "[]"
            assert home(f"insert into t values ('home', {number})") == "[]"
        assert host("begin immediate") == "[]"
        assert home("pragma busy_timeout = 1") == "[(1,)]"
        assert home("begin immediate") == "database is locked"
        assert host("insert into t values ('host', 20)") == "[]"
        assert host("commit") == "[]"
        assert home("select count(*) from t") == "[(41,)]"
        assert home("delete from t where n > 10") == "[]"
        assert host("select count(*) from t") == "[(22,)]"
        assert host("pragma integrity_check") == "[('ok',)]"


@pytest.mark.requires("command:git")
def test_git_works(tree: Served) -> None:
    script = """
    export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b HOME=$PWD
    git init -q work && cd work
    for n in $(seq 30); do mkdir -p d$n; echo $n > d$n/f; done
    git add . && git commit -qm one
    git checkout -qb other && git mv d1 moved && git commit -qam two
    git checkout -q - && git merge -q other && git gc -q && git status --porcelain && git fsck --strict
    git log --oneline | wc -l; ls moved
    """
    assert tree.run("bash", "-ec", script).split() == ["2", "f"]
    assert (tree.home / "work/moved/f").read_text() == "1\n"


def test_locks_are_told_of_with_their_range(tree: Served) -> None:
    (tree.home / "a").write_bytes(b"x" * 100)
    with open(tree.home / "a", "r+b") as held, open(tree.host / "a", "r+b") as asked:
        fcntl.lockf(held, fcntl.LOCK_SH, 7, 13)
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        kind, _, start, length, _ = struct.unpack("hhqqi4x", fcntl.fcntl(asked, fcntl.F_GETLK, query))
        assert (kind, start, length) == (fcntl.F_RDLCK, 13, 7)


@pytest.mark.parametrize("lock", [fcntl.lockf, fcntl.flock])
def test_who_takes_a_lock_sees_what_the_last_holder_wrote(
    tree: Served, lock: Callable[[int, int], None]
) -> None:
    (tree.home / "count").write_bytes(b"%08d" % 0)
    home, host = (os.open(path / "count", os.O_RDWR) for path in (tree.home, tree.host))
    seen_there = []
    for at in range(30):
        lock(home, fcntl.LOCK_EX)
        os.pwrite(home, b"%08d" % at, 0)
        lock(home, fcntl.LOCK_UN)
        lock(host, fcntl.LOCK_SH)
        seen_there.append(int(os.pread(host, 8, 0)))
        lock(host, fcntl.LOCK_UN)
    assert seen_there == list(range(30))
    os.close(home)
    os.close(host)


def test_a_host_that_goes_away_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/a").write_bytes(b"x")
    with open(tmp_path / "home/a", "r+b") as home:
        with served(tmp_path / "home", tmp_path / "mnt", "socket") as tree:
            host = os.open(tree.host / "a", os.O_RDWR)
            fcntl.lockf(host, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError):
                fcntl.lockf(home, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert seen(os.close, host) == "ENOTCONN"
        fcntl.lockf(home, fcntl.LOCK_EX | fcntl.LOCK_NB)
