"""A list of pending pages outlives the pager that keeps it, wherever that one dies."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.linux import userfaultfd
from godwit.migrate import pending
from godwit.migrate.pending import Pending, Space
from godwit.types import Fd

MOVE = secrets.token_hex(16)
MESSAGE = struct.Struct("<B7xQQQ")
PAGE = 4096
REMOVED = MESSAGE.pack(userfaultfd.UFFD_EVENT_REMOVE, 0x10000, 0x12000, 0)
MOVED = MESSAGE.pack(userfaultfd.UFFD_EVENT_REMAP, 0x14000, 0x40000, 0x2000)
REMOVED_THERE = MESSAGE.pack(userfaultfd.UFFD_EVENT_UNMAP, 0x40000, 0x41000, 0)
BORN = MESSAGE.pack(userfaultfd.UFFD_EVENT_FORK, 9, 0, 0)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GODWIT_STATE_DIR", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def saying(*messages: bytes) -> Iterator[Fd]:
    """Something to read messages from, as from a userfaultfd."""
    near, far = os.pipe2(os.O_NONBLOCK)
    try:
        os.write(far, b"".join(messages))
        yield Fd(near)
    finally:
        os.close(near)
        os.close(far)


def dying(pager: Callable[[Pending, Space], None]) -> int:
    """Run a pager with one space that lacks 64 KiB, in a process of its own; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            made = Pending.create(MOVE)
            space = made.add(0, 5)
            made.leave(space, 0x10000, 0x20000)
            pager(made, space)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def lacking(found: Pending, number: int = 0) -> dict[int, list[tuple[int, int]]]:
    return {shift: list(ranges) for shift, ranges in found.spaces[number].pending.items()}


@pytest.mark.parametrize("noted", [0, 1, 2, 3])
def test_messages_that_a_killed_pager_had_read_are_not_lost(noted: int) -> None:
    def pager(made: Pending, space: Space) -> None:
        with saying(REMOVED, MOVED, REMOVED_THERE) as uffd, made.reading(space, uffd) as found:
            for message in found[:noted]:
                made.note(space, message)
            os.kill(os.getpid(), signal.SIGKILL)

    assert dying(pager) == signal.SIGKILL
    with contextlib.closing(Pending.take_over(MOVE)) as heir:
        assert not heir.torn
        assert lacking(heir) == {0: [(0x12000, 0x14000), (0x16000, 0x20000)], 0x2C000: [(0x41000, 0x42000)]}


def test_a_child_that_was_adopted_before_the_death_is_known() -> None:
    def pager(made: Pending, space: Space) -> None:
        with saying(BORN, REMOVED) as uffd, made.reading(space, uffd):
            made.forked(space, 7)
            os.kill(os.getpid(), signal.SIGKILL)

    dying(pager)
    with contextlib.closing(Pending.take_over(MOVE)) as heir:
        assert not heir.torn
        assert heir.spaces[1].kept_at == 7
        assert (lacking(heir, 0), lacking(heir, 1)) == ({0: [(0x12000, 0x20000)]}, {0: [(0x10000, 0x20000)]})


def test_a_child_that_was_not_is_told_of() -> None:
    def pager(made: Pending, space: Space) -> None:
        with saying(BORN) as uffd, made.reading(space, uffd):
            os.kill(os.getpid(), signal.SIGKILL)

    dying(pager)
    for _ in range(2):
        with contextlib.closing(Pending.take_over(MOVE)) as heir:
            assert heir.torn


def test_who_is_asked_to_go_notes_first_what_it_has_read() -> None:
    def pager(made: Pending, space: Space) -> None:
        with saying(REMOVED) as uffd, made.reading(space, uffd) as found:
            os.kill(os.getpid(), signal.SIGTERM)
            made.note(space, found[0])

    assert dying(pager) == signal.SIGTERM
    with contextlib.closing(Pending.take_over(MOVE)) as heir:
        assert lacking(heir) == {0: [(0x12000, 0x20000)]}


def test_half_a_record_is_none() -> None:
    def pager(made: Pending, space: Space) -> None:
        made.gone(space, 0x10000, 0x11000)

    dying(pager)
    with pending.path_of(MOVE).open("ab") as file:
        file.write(b"\x03\0\0")
    for start in (0x11000, 0x12000):
        with contextlib.closing(Pending.take_over(MOVE)) as heir:
            heir.gone(heir.spaces[0], start, start + PAGE)
    with contextlib.closing(Pending.take_over(MOVE)) as heir:
        assert lacking(heir) == {0: [(0x13000, 0x20000)]}


def test_only_lists_without_a_pager_are_forgotten() -> None:
    with contextlib.closing(Pending.create(MOVE)):
        assert list(pending.forgotten()) == []
    assert list(pending.forgotten()) == [MOVE]
