"""A host that may believe what it knows for ten minutes hears of what home changes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.homefiles import Served, served
from tests.kernel.homefiles_cases import seen
from tests.kernel.test_homefiles_shared import wait_for

# Threads act as others, which marks the whole process (PR_SET_DUMPABLE): not among the everyday tests.
pytestmark = [pytest.mark.requires("root"), pytest.mark.slow]

LONG_NS = 600 * 10**9


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "home/d").mkdir(parents=True)
    (tmp_path / "home/d/a").write_bytes(b"old")
    with served(tmp_path / "home", tmp_path / "mnt", watched_ttl_ns=LONG_NS) as found:
        yield found


def test_new_content_is_seen(tree: Served) -> None:
    with open(tree.host / "d/a", "rb", buffering=0) as file:
        assert file.read() == b"old"
        for content in (b"new", b"NEW", b"longer than before", b""):
            (tree.home / "d/a").write_bytes(content)
            until_it_reads(file.fileno(), content)


def until_it_reads(fd: int, content: bytes) -> None:
    wait_for(lambda: os.pread(fd, 100, 0) == content, "the content")
    wait_for(lambda: os.fstat(fd).st_size == len(content), "the size")


def test_names_that_come_and_go_are_seen(tree: Served) -> None:
    assert not (tree.host / "d/b").exists()
    (tree.home / "d/b").write_bytes(b"b")
    wait_for((tree.host / "d/b").exists, "the new name")
    os.rename(tree.home / "d/b", tree.home / "d/c")
    wait_for(lambda: not (tree.host / "d/b").exists() and (tree.host / "d/c").exists(), "the other name")
    assert sorted(os.listdir(tree.host / "d")) == ["a", "c"]
    (tree.home / "d/c").unlink()
    wait_for(lambda: seen(os.stat, tree.host / "d/c") == "ENOENT", "the name is gone")
    (tree.home / "new").write_bytes(b"replaced")
    os.rename(tree.home / "new", tree.home / "d/a")
    wait_for(lambda: (tree.host / "d/a").read_bytes() == b"replaced", "another file of that name")


def test_attributes_are_seen(tree: Served) -> None:
    assert (tree.host / "d/a").stat().st_mode & 0o777 == 0o644
    (tree.home / "d/a").chmod(0o600)
    wait_for(lambda: (tree.host / "d/a").stat().st_mode & 0o777 == 0o600, "the mode")
    os.link(tree.home / "d/a", tree.home / "second")
    wait_for(lambda: (tree.host / "d/a").stat().st_nlink == 2, "the link count")


def test_what_the_host_does_itself_stays_known_to_it(tree: Served) -> None:
    path = tree.host / "d/mine"
    path.write_bytes(b"x" * 100000)
    assert path.read_bytes() == b"x" * 100000
    path.stat()
    before = tree.requests()
    for _ in range(50):
        assert path.stat().st_size == 100000
        assert (tree.host / "d/a").parent.exists()
    assert tree.requests() - before <= 2
    with open(path, "rb", buffering=0) as file:
        before = tree.requests()
        for _ in range(20):
            os.pread(file.fileno(), 4096, 0)
        assert tree.requests() - before <= 1


def test_changes_elsewhere_cost_the_host_nothing(tree: Served, tmp_path: Path) -> None:
    (tree.host / "d/a").read_bytes()
    before = tree.requests()
    for number in range(100):
        (tmp_path / f"outside{number}").write_bytes(b"x")
    assert (tree.host / "d/a").stat().st_size == 3
    assert tree.requests() - before <= 1


def test_a_program_at_home_and_one_at_the_host_take_turns(tree: Served) -> None:
    script = "for n in $(seq 20); do until [ -e {see}$n ]; do :; done; echo $n > {make}$n; done"
    (tree.home / "first1").write_bytes(b"")
    for n in range(2, 21):
        (tree.home / f"first{n}").write_bytes(b"")
    host = subprocess.Popen([*tree.enter, "bash", "-c", script.format(see="first", make="second")])
    home = subprocess.Popen(["env", "-C", tree.home, "bash", "-c", script.format(see="second", make="third")])
    assert (host.wait(timeout=60), home.wait(timeout=60)) == (0, 0)
    wait_for((tree.host / "third20").exists, "the last turn")
