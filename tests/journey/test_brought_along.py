"""A file that only its program writes moves with it, from machine to machine, and is nobody else's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import DestinationError, MigrationError, RefusedError
from godwit.lab.cluster import Lab, Node
from godwit.linux.statx import birth_ns
from godwit.types import OwnedFd
from tests.conftest import requires
from tests.journey.live import Watched
from tests.journey.transfer import GODWIT, MOVE_TIMEOUT_S, complaint, environment, is_empty
from tests.workloads.driver import wait_until

pytestmark = requires("root")

OWNER = 1234
QUIET_TIMEOUT_S = 20.0
# Writes numbered lines at its offset: a byte lost, doubled or put elsewhere shows in the file.
DIARY = """
import os, sys, time
path, owner = sys.argv[1], int(sys.argv[2])
file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
os.fchown(file, owner, owner)
os.fchmod(file, 0o640)
number = 0
while not os.path.exists("/shared/end"):
    os.write(file, b"%d\\n" % number)
    number += 1
    time.sleep(0.005)
    assert os.fstat(file).st_size == os.lseek(file, 0, os.SEEK_CUR)
open("/shared/ended", "w").write(str(number))
"""
# Keeps a diary, and closes it when told to: from then on nothing but the name leads to it.
FINISHED = """
import os, sys, time
memory = bytearray(os.urandom(1 << 20)) * 24
with open(sys.argv[1], "x") as file:
    file.write("all of it")
    file.flush()
    while not os.path.exists(sys.argv[2] + ".close"):
        time.sleep(0.005)
open(sys.argv[2] + ".closed", "x").close()
while True:
    time.sleep(0.005)
"""
READER = "import sys, time\nfile = open(sys.argv[1])\nprint('open', flush=True)\ntime.sleep(1000)"


class Diary:
    """A program that keeps a diary, on one node or another."""

    def __init__(self, lab: Lab, directory: str) -> None:
        self.lab = lab
        self.path = f"{directory}/diary-{uuid.uuid4().hex}"
        self.node = lab.node("a")
        words = [sys.executable, "-c", DIARY, self.path, str(OWNER)]
        with contextlib.closing(self.node.start(words, env=environment())) as started:
            self.pid = int(started.node_pid)
        self.wait_for_progress()

    def lines(self, node: Node | None = None) -> list[str]:
        path = (node or self.node).path(self.path)
        text = path.read_text() if path.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def wait_for_progress(self) -> None:
        before = len(self.lines())
        assert wait_until(lambda: len(self.lines()) >= before + 5, QUIET_TIMEOUT_S), self.lines()[-3:]
        lines = self.lines()
        assert lines == [str(number) for number in range(len(lines))]

    def migrate(self, destination: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        command = [*GODWIT, "migrate", str(self.pid), destination, "--json", *words]
        return self.node.run(command, env=environment(), timeout_s=MOVE_TIMEOUT_S)

    def move(self, destination: str) -> None:
        done = self.migrate(destination)
        assert done.returncode == 0, complaint(done)
        told: dict[str, Any] = json.loads(done.stdout)
        self.node, self.pid = self.lab.node(destination), told["pid"]

    def expect_only_at(self, name: str) -> None:
        """See that one node alone has the file, as it was made, and that its program goes on."""
        for node in self.lab.nodes:
            assert node.path(self.path).exists() == (node.name == name), node.name
        found = self.node.path(self.path).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (OWNER, OWNER, 0o640)
        self.wait_for_progress()


def identity(path: Path) -> tuple[int, int]:
    """Return inode number and time of birth: what tells files of one file system apart."""
    with OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd:
        return os.fstat(fd.number).st_ino, birth_ns(fd.number)


def made(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Make a directory on each node, at once."""
    for path in paths:
        path.mkdir()
    return [identity(path) for path in paths]


def unmade(paths: Sequence[Path]) -> None:
    for path in paths:
        path.rmdir()


@contextlib.contextmanager
def emptied(lab: Lab, paths: Sequence[Path]) -> Iterator[None]:
    """Give directories to the owner; at the end of the block every node is empty again."""
    for path in paths:
        os.chown(path, OWNER, OWNER)
    try:
        yield
    finally:
        for node, path in zip(lab.nodes, paths, strict=False):
            for pid in node.pids():
                node.run(["kill", "-KILL", str(pid)])
            assert wait_until(partial(is_empty, node), QUIET_TIMEOUT_S)
            shutil.rmtree(path)


@pytest.fixture
def directory(lab: Lab) -> Iterator[str]:
    """A directory of the owner's, of one name on every node but of its own on each."""
    name = f"/tmp/diaries-{uuid.uuid4().hex}"
    paths = [node.path(name) for node in lab.nodes]
    for at in range(len(paths)):
        assert wait_until(partial(born_apart, paths[: at + 1]), QUIET_TIMEOUT_S)
    with emptied(lab, paths):
        yield name


def born_apart(paths: Sequence[Path]) -> bool:
    """Make the last directory, if no other was born in the same tick: the clock of file systems is coarse."""
    [(_, birth)] = made(paths[-1:])
    if birth not in {identity(path)[1] for path in paths[:-1]}:
        return True
    unmade(paths[-1:])
    return False


@pytest.fixture
def twins(lab: Lab) -> Iterator[str]:
    """Directories on two nodes, with one inode number and one time of birth."""
    name = f"/tmp/twins-{uuid.uuid4().hex}"
    paths = [node.path(name) for node in lab.nodes[:2]]
    for _ in range(200):
        first, second = made(paths)
        if first == second:
            break
        unmade(paths)
        # The younger file system has given out fewer numbers.
        behind = paths[0 if first < second else 1].with_name("number")
        for _ in range(min(abs(first[0] - second[0]), 1000)):
            behind.touch()
            behind.unlink()
    else:
        pytest.skip("the file systems of the nodes count differently")
    with emptied(lab, paths):
        yield name


def test_it_goes_away_and_comes_back(lab: Lab, shared: Path, directory: str) -> None:
    diary = Diary(lab, directory)
    diary.expect_only_at("a")
    for destination in ("b", "a", "c"):
        diary.move(destination)
        diary.expect_only_at(destination)
    (shared / "end").touch()
    try:
        assert wait_until((shared / "ended").exists, QUIET_TIMEOUT_S)
        assert wait_until(lambda: not diary.node.pids(), QUIET_TIMEOUT_S)
        assert len(diary.lines()) == int((shared / "ended").read_text())
    finally:
        (shared / "end").unlink()


def test_directories_on_its_way_are_made_for_its_owner(lab: Lab, directory: str) -> None:
    for node in lab.nodes[:1]:
        node.path(f"{directory}/deep").mkdir()
        os.chown(node.path(f"{directory}/deep"), OWNER, OWNER)
    diary = Diary(lab, f"{directory}/deep")
    diary.move("b")
    diary.expect_only_at("b")
    found = lab.node("b").path(f"{directory}/deep").stat()
    assert (found.st_uid, found.st_gid) == (OWNER, OWNER)


def has_open(fds: Path, path: str) -> bool:
    """Tell whether a program that is just starting, and closes files too, has this one open."""
    for fd in fds.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(fd) == path:
                return True
    return False


def test_a_second_user_keeps_it_here(lab: Lab, directory: str) -> None:
    diary = Diary(lab, directory)
    words = [sys.executable, "-u", "-c", READER, diary.path]
    with contextlib.closing(diary.node.start(words, env=environment())) as reader:
        fds = diary.node.path(f"proc/{reader.node_pid}/fd")
        assert wait_until(partial(has_open, fds, diary.path), QUIET_TIMEOUT_S)
        done = diary.migrate("b")
        assert done.returncode == RefusedError.exit_status, complaint(done)
        assert f"pid {reader.node_pid} uses it too" in done.stderr.decode()
        diary.expect_only_at("a")
        reader.kill()
        assert reader.wait(QUIET_TIMEOUT_S)
    diary.move("b")
    diary.expect_only_at("b")


def test_one_that_is_closed_on_the_way_stays_where_it_is(lab: Lab, shared: Path, directory: str) -> None:
    path, sign = f"{directory}/finished", f"/shared/{uuid.uuid4().hex}"
    here, there = (lab.node(name).path(path) for name in "ab")
    words = [sys.executable, "-c", FINISHED, path, sign]
    with contextlib.closing(lab.node("a").start(words, env=environment())) as started:
        assert wait_until(lambda: here.exists() and here.read_text() == "all of it", QUIET_TIMEOUT_S)
        line = [*GODWIT, "migrate", str(started.node_pid), "b", "--bandwidth", "12MB/s"]
        with Watched(lab.node("a"), line, 0) as command:
            # The destination has made its own by now.
            assert wait_until(there.exists, QUIET_TIMEOUT_S)
            (shared / f"{sign.removeprefix('/shared/')}.close").touch()
            assert wait_until((shared / f"{sign.removeprefix('/shared/')}.closed").exists, QUIET_TIMEOUT_S)
            done = command.finish()
        assert done.returncode == 0, done.stderr
        assert here.read_text() == "all of it"
        assert not there.exists()


def test_a_second_name_keeps_it_here(lab: Lab, directory: str) -> None:
    diary = Diary(lab, directory)
    os.link(diary.node.path(diary.path), diary.node.path(f"{directory}/other"))
    done = diary.migrate("b")
    assert done.returncode == RefusedError.exit_status, complaint(done)
    assert "2 names" in done.stderr.decode()
    diary.expect_only_at("a")


def test_a_move_that_runs_out_of_time_leaves_it_here(lab: Lab, directory: str) -> None:
    diary = Diary(lab, directory)
    done = diary.migrate("b", "--timeout", "0.001")
    assert done.returncode == MigrationError.exit_status, complaint(done)
    diary.expect_only_at("a")
    assert list(lab.node("b").path(directory).iterdir()) == []
    assert lab.node("b").pids() == []


def test_a_destination_where_its_owner_may_not_write_leaves_it_here(lab: Lab, directory: str) -> None:
    diary = Diary(lab, directory)
    there = lab.node("b").path(directory)
    os.chown(there, 0, 0)
    done = diary.migrate("b")
    assert done.returncode == DestinationError.exit_status, complaint(done)
    assert "may not make files" in done.stderr.decode()
    diary.expect_only_at("a")
    assert list(there.iterdir()) == []
    assert lab.node("b").pids() == []


def test_twin_directories_are_not_taken_for_one(lab: Lab, twins: str) -> None:
    diary = Diary(lab, twins)
    diary.move("b")
    diary.expect_only_at("b")
