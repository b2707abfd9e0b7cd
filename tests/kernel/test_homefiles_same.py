"""A program cannot tell a directory of home, seen from the host, from a directory of its own."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.homefiles import Served, served
from tests.kernel.homefiles_cases import CASES, USER, forked

# Threads act as others, which marks the whole process (PR_SET_DUMPABLE): not among the everyday tests.
pytestmark = [pytest.mark.requires("root"), pytest.mark.slow]

JOB = {"uids": (0,), "gids": (0,), "groups": ()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("files")
    base.chmod(0o755)
    (base / "home").mkdir()
    groups = {USER[0]: USER[2], USER[0] + 1: ()}
    with served(base / "home", base / "mnt", who={**JOB, "groups_of": groups}) as found:
        yield found


def left(directory: Path) -> list[tuple[object, ...]]:
    """List what is below a directory, without times and numbers."""
    found: list[tuple[object, ...]] = []
    below = [Path(top) / name for top, names, files in os.walk(directory) for name in names + files]
    for path in sorted(below):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = path.read_bytes() if kind == stat.S_IFREG and status.st_size < 1 << 20 else b""
        size = status.st_size if kind != stat.S_IFDIR else 0
        name = os.fsencode(path.relative_to(directory))
        found.append((name, oct(status.st_mode), status.st_uid, status.st_gid, size, content))
    return found


def run(name: str, directory: Path) -> object:
    def inside() -> object:
        os.umask(0o022)
        os.chdir(directory)
        return CASES[name]()

    return forked(inside)


@pytest.mark.parametrize("name", CASES)
def test_a_program_sees_the_same(name: str, tree: Served, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tree.host / name).mkdir()
    plain = run(name, tmp_path / name)
    assert not (isinstance(plain, str) and "Error" in plain), plain
    assert run(name, tree.host / name) == plain
    assert left(tree.home / name) == left(tmp_path / name)
