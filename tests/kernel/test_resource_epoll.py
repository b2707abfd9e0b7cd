"""An epoll set moves with its interests, however their numbers changed since."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

import pytest

from godwit.errors import ImageError, UnsupportedStateError
from godwit.linux import epoll as kernel
from godwit.resources import epoll, eventfd, pipe, unixsocket
from godwit.resources.base import Disposition, FileKind
from godwit.resources.epoll import EpollEntry, EpollWatch
from godwit.types import FileId, OwnedFd
from tests.kernel.openfiles import Builder, Child, held, info_of, over_the_wire, puppet

KINDS: tuple[FileKind, ...] = (eventfd.KIND, pipe.KIND, unixsocket.KIND, epoll.KIND)


@contextlib.contextmanager
def attached(child: Child) -> Iterator[Builder]:
    """Move everything, give it to a process under the old numbers, and fill the sets there."""
    builder = Builder()
    entries: list[EpollEntry] = []
    try:
        for kind in KINDS:
            files = [file for file in child.files if kind.claims(file)]
            for entry in [over_the_wire(kind, entry) for entry in kind.collect(files, child)]:
                builder.files.update(kind.restore(entry, builder))
                entries += [entry] if isinstance(entry, EpollEntry) else []
        with puppet() as process:
            for file in child.files:
                process.give(file.file_id, builder.files[file.file_id], *(fd for _, fd in file.holders))
            for entry in entries:
                epoll.attach(entry, process)
            yield builder
    finally:
        builder.close()


def interests(fd: OwnedFd) -> list[tuple[int, int, int]]:
    return sorted((line.tfd, line.events, line.data) for line in info_of(fd).epoll)


def wait(fd: OwnedFd) -> list[tuple[int, int]]:
    """Take the events of a set; data is what the test chose, the number as a rule."""
    with contextlib.closing(select.epoll.fromfd(os.dup(fd.number))) as waiting:
        return sorted(waiting.poll(0))


def control(epoll_fd: int, fd: int, events: int) -> None:
    with contextlib.closing(select.epoll.fromfd(os.dup(epoll_fd))) as instance:
        instance.register(fd, events)


def new_set() -> int:
    with contextlib.closing(select.epoll()) as made:
        return os.dup(made.fileno())


def test_what_is_ready_is_reported_as_to_the_unmoved_twin() -> None:
    poller, counter, (reader, writer) = new_set(), os.eventfd(1), os.pipe()
    control(poller, counter, select.EPOLLIN)
    control(poller, reader, select.EPOLLIN | select.EPOLLET)
    control(poller, writer, select.EPOLLOUT | select.EPOLLONESHOT)
    with held(poller, counter, reader, writer) as child, child.twin(poller) as twin:
        assert epoll.inspect(child.at(poller), child).disposition is Disposition.MOVE
        with attached(child) as builder:
            mine = builder.files[child.at(poller).file_id]
            assert interests(mine) == interests(twin)
            assert wait(mine) == wait(twin) == [(counter, select.EPOLLIN), (writer, select.EPOLLOUT)]
            assert wait(mine) == wait(twin) == [(counter, select.EPOLLIN)]


def test_later_events_arrive_too() -> None:
    poller, (reader, writer) = new_set(), os.pipe()
    control(poller, reader, select.EPOLLIN | select.EPOLLET)
    with held(poller, reader, writer) as child, attached(child) as builder:
        mine = builder.files[child.at(poller).file_id]
        assert wait(mine) == []
        os.write(builder.files[child.at(writer).file_id].number, b"x")
        assert wait(mine) == [(reader, select.EPOLLIN)]
        assert wait(mine) == []


def test_a_spent_one_shot_watch_stays_spent() -> None:
    poller, counter = new_set(), os.eventfd(1)
    control(poller, counter, select.EPOLLIN | select.EPOLLONESHOT)
    with OwnedFd(os.dup(poller)) as fd:
        assert wait(fd) == [(counter, select.EPOLLIN)]
    other = os.eventfd(1)
    control(poller, other, select.EPOLLIN | select.EPOLLET)
    with held(poller, counter, other) as child, child.twin(poller) as twin, attached(child) as builder:
        mine = builder.files[child.at(poller).file_id]
        assert interests(mine) == interests(twin)
        assert wait(mine) == wait(twin) == [(other, select.EPOLLIN)]


def test_a_spent_watch_on_what_is_not_ready_is_refused_and_says_to_wait() -> None:
    poller, (reader, writer) = new_set(), os.pipe()
    control(poller, reader, select.EPOLLIN | select.EPOLLONESHOT)
    os.write(writer, b"x")
    with OwnedFd(os.dup(poller)) as fd:
        assert wait(fd)
    os.read(reader, 1)
    with held(poller, reader, writer) as child, pytest.raises(UnsupportedStateError) as caught:
        epoll.collect([child.at(poller)], child)
    assert caught.value.refusals[0].remedy == "try again in a moment"


@pytest.mark.parametrize("occupied", [False, True])
def test_a_watched_file_that_lives_under_another_number_keeps_its_old_one_in_the_set(occupied: bool) -> None:
    poller, counter = new_set(), os.eventfd(1)
    control(poller, counter, select.EPOLLIN)
    elsewhere = os.dup(counter)
    os.close(counter)
    occupant = os.eventfd(0) if occupied else -1
    assert occupant in (counter, -1)
    fds = [poller, elsewhere] + ([occupant] if occupied else [])
    with held(*fds) as child, child.twin(poller) as twin, attached(child) as builder:
        mine = builder.files[child.at(poller).file_id]
        assert interests(mine) == interests(twin)
        assert [tfd for tfd, _, _ in interests(mine)] == [counter]
        assert wait(mine) == wait(twin) == [(counter, select.EPOLLIN)]


def test_the_occupant_of_an_old_number_keeps_it_with_its_flag() -> None:
    entry = EpollEntry(
        file_id=FileId(1),
        watches=(EpollWatch(file_id=FileId(2), number=20, events=select.EPOLLIN, data=9),),
    )
    with OwnedFd(os.eventfd(1)) as counter, OwnedFd(os.eventfd(5)) as occupant, puppet() as process:
        made = epoll.restore(entry, Builder())
        with made[FileId(1)] as mine:
            process.give(FileId(1), mine, 10)
            process.give(FileId(2), counter, 11)
            process.give(FileId(3), occupant, 20)
            process.call(process.pid, "fcntl", 20, 2, 0)  # F_SETFD: inherited
            epoll.attach(entry, process)
            assert wait(mine) == [(9, select.EPOLLIN)]
            assert process.call(process.pid, "fcntl", 20, 1, 0) == 0  # F_GETFD
            assert sorted(os.listdir(f"/proc/{process.pid}/fd")) == ["10", "11", "20", "200"]
            counts = [line for line in _fdinfo(process.pid, 20).splitlines() if "eventfd-count" in line]
            assert counts[0].split() == ["eventfd-count:", "5"]


def test_a_borrowed_number_is_given_back() -> None:
    watch = EpollWatch(file_id=FileId(2), number=20, events=select.EPOLLIN, data=9)
    entry = EpollEntry(file_id=FileId(1), watches=(watch,))
    made = epoll.restore(entry, Builder())
    with OwnedFd(os.eventfd(1)) as counter, puppet() as process, made[FileId(1)] as mine:
        process.give(FileId(1), mine, 10)
        process.give(FileId(2), counter, 11)
        epoll.attach(entry, process)
        assert wait(mine) == [(9, select.EPOLLIN)]
        assert sorted(os.listdir(f"/proc/{process.pid}/fd")) == ["10", "11", "200"]


def _fdinfo(pid: int, fd: int) -> str:
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        return file.read()


def test_two_files_added_under_the_same_number_are_told_apart() -> None:
    poller = new_set()
    first = os.eventfd(1)
    control(poller, first, select.EPOLLIN)
    moved_first = os.dup(first)
    os.close(first)
    second = os.eventfd(0)
    assert second == first
    control(poller, second, select.EPOLLOUT)
    with held(poller, moved_first, second) as child, child.twin(poller) as twin:
        entry = epoll.collect([child.at(poller)], child)[0]
        assert {(watch.file_id, watch.events & 5) for watch in entry.watches} == {
            (child.at(moved_first).file_id, 1),
            (child.at(second).file_id, 4),
        }
        with attached(child) as builder:
            mine = builder.files[child.at(poller).file_id]
            assert interests(mine) == interests(twin)
            assert wait(mine) == wait(twin)


def test_a_set_in_a_set_and_an_exclusive_watch_move() -> None:
    outer, inner, (left, right) = new_set(), new_set(), socket.socketpair()
    control(inner, left.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE)
    control(outer, inner, select.EPOLLIN)
    right.send(b"x")
    fds = (outer, inner, left.detach(), right.detach())
    with held(*fds) as child, child.twin(outer) as twin, attached(child) as builder:
        mine = builder.files[child.at(outer).file_id]
        assert wait(mine) == wait(twin) == [(inner, select.EPOLLIN)]
        with child.twin(inner) as inner_twin:
            assert interests(builder.files[child.at(inner).file_id]) == interests(inner_twin)


def test_a_watched_file_that_only_others_hold_is_refused() -> None:
    poller, counter = new_set(), os.eventfd(1)
    control(poller, counter, select.EPOLLIN)
    with OwnedFd(counter), held(poller, close=False) as child:
        os.close(poller)
        finding = epoll.inspect(child.at(poller), child)
        assert finding.disposition is Disposition.REFUSE
        assert f"fd {counter}" in finding.why


def test_a_watch_that_no_process_can_add_is_a_damaged_image() -> None:
    watch = EpollWatch(file_id=FileId(2), number=5, events=1, data=0)
    with puppet() as process, OwnedFd(os.eventfd(0)) as fd:
        process.table = {FileId(1): [], FileId(2): []}
        process.give(FileId(2), fd, 5)
        with pytest.raises(ImageError):
            epoll.attach(EpollEntry(file_id=FileId(1), watches=(watch,)), process)


def test_readiness_bits_are_those_of_the_system() -> None:
    assert kernel.EPOLLONESHOT == select.EPOLLONESHOT
    assert kernel.EPOLLET == select.EPOLLET
    assert kernel.EPOLLEXCLUSIVE == select.EPOLLEXCLUSIVE
    assert not kernel.READINESS & (select.EPOLLONESHOT | select.EPOLLET | select.EPOLLEXCLUSIVE)
