"""Event counters move with what was not yet read."""

from __future__ import annotations

import os

import pytest

from godwit.errors import ImageError
from godwit.resources import eventfd
from godwit.resources.base import Disposition
from godwit.resources.eventfd import EventFdEntry
from godwit.types import FileId, OwnedFd
from tests.kernel.openfiles import Builder, held, info_of, moved, restored, same


@pytest.mark.parametrize("counter", [0, 1, 7, 2**32 + 5, 2**64 - 2])
@pytest.mark.parametrize("mode", [0, os.EFD_SEMAPHORE])
def test_the_next_reads_return_what_the_unmoved_twin_reads(counter: int, mode: int) -> None:
    fd = os.eventfd(0, mode | os.EFD_NONBLOCK)
    os.eventfd_write(fd, counter)
    with held(fd) as child, restored(eventfd.KIND, child) as builder, child.twin(fd) as twin:
        mine = moved(child, builder, fd)
        os.set_blocking(mine.number, False)  # by the descriptor table, in a move
        assert info_of(twin).fields["eventfd-count"] == f"{counter:16x}".strip()
        same(_two_reads, mine, twin)
        same(lambda fd: info_of(fd).fields["eventfd-count"], mine, twin)


def _two_reads(fd: OwnedFd) -> list[int]:
    values = []
    for _ in range(2):
        try:
            values.append(os.eventfd_read(fd.number))
        except BlockingIOError:
            values.append(-1)
    return values


def test_check_finds_that_it_moves() -> None:
    fd = os.eventfd(3)
    with held(fd) as child:
        assert eventfd.inspect(child.at(fd), child).disposition is Disposition.MOVE


def test_an_impossible_counter_from_a_peer_is_refused() -> None:
    entry = EventFdEntry(file_id=FileId(1), counter=2**64 - 1, semaphore=False)
    with pytest.raises(ImageError, match="impossible counter"):
        eventfd.restore(entry, Builder())
