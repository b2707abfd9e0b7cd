"""Pages over several connections: all of them arrive, and a connection that breaks ends the move."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from godwit.engine.ranges import Range, Ranges
from godwit.errors import ImageError, MigrationError, Survivor
from godwit.migrate import lanes
from godwit.migrate.channel import Channel, SocketPipe
from godwit.migrate.lanes import Lanes, Meeting
from godwit.migrate.options import Options
from godwit.migrate.pagestream import PageStream, buffer_of_pages
from godwit.types import PAGE_SIZE
from godwit.wire.frames import FrameKind

MOVE = "0123456789abcdef0123456789abcdef"
PAGES = 2000
CHUNK_PAGES = 64


class Memory:
    """What a destination writes to."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}

    def write_process_pages(self, index: int, runs: Ranges, data: memoryview | None) -> None:
        assert index == 0
        at = 0
        for start, end in runs:
            for page in range(start, end, PAGE_SIZE):
                assert page not in self.pages, "it came twice"
                self.pages[page] = bytes(PAGE_SIZE) if data is None else bytes(data[at : at + PAGE_SIZE])
                at += PAGE_SIZE

    def drop_process_pages(self, index: int, runs: Ranges) -> None:
        raise AssertionError((index, runs))

    def write_object_pages(self, object_id: int, runs: Ranges, data: memoryview | None) -> None:
        raise AssertionError((object_id, runs, data))

    def drop_object_pages(self, object_id: int, runs: Ranges) -> None:
        raise AssertionError((object_id, runs))

    def leave(self, index: int, runs: Ranges) -> None:
        raise AssertionError((index, runs))


class Idle(PageStream):
    """A first connection that leaves everything to the lanes."""

    def send(self, *_: object) -> int:
        return 0


_made: list[Channel] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


def pair() -> tuple[Channel, Channel]:
    ours, theirs = (Channel(SocketPipe(end)) for end in socket.socketpair())
    _made.extend((ours, theirs))
    return ours, theirs


def page(number: int) -> bytes:
    """Return a page of its own, every eighth one empty."""
    return bytes(PAGE_SIZE) if number % 8 == 0 else number.to_bytes(8, "little") * (PAGE_SIZE // 8)


def read(runs: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
    at = 0
    for start, end in runs:
        for number in range(start // PAGE_SIZE, end // PAGE_SIZE):
            into[at : at + PAGE_SIZE] = page(number)
            at += PAGE_SIZE
    return runs, at


def groups(pages: int) -> Iterator[list[Range]]:
    for first in range(0, pages, CHUNK_PAGES):
        yield [(number * PAGE_SIZE, (number + 1) * PAGE_SIZE) for number in range(first, first + CHUNK_PAGES)]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Longer than a socket's address may be.
    deep = tmp_path / ("d" * 100)
    monkeypatch.setenv("GODWIT_STATE_DIR", str(deep))
    return deep


def relayed(ends: list[threading.Thread]) -> Channel:
    """Return the source's end of a lane whose other end has a thread for a process."""
    ours, theirs = pair()

    def serve() -> None:
        theirs.open_stream()
        theirs.accept_stream()
        theirs.expect(FrameKind.LANE)
        lanes.relay(theirs, MOVE)

    ends.append(threading.Thread(target=serve))
    ends[-1].start()
    return ours


def test_every_page_arrives_once(state: Path) -> None:
    memory, ends = Memory(), list[threading.Thread]()
    first, there = pair()
    made = Meeting(MOVE)

    def build() -> None:
        with contextlib.closing(made):
            made.turn(there, memory)
            there.expect(FrameKind.TREE)
            made.finish()

    builder = threading.Thread(target=build)
    builder.start()
    ours = Lanes()
    ours.open(3, MOVE, lambda: relayed(ends))
    # The first connection's own share is not looked at here: it gets none.
    idle = Idle(first, buffer_of_pages())
    ours.send(idle, (0, 0), groups(PAGES), read)
    assert ours.pages == len(memory.pages) >= PAGES
    assert all(content == page(at // PAGE_SIZE) for at, content in memory.pages.items())
    ours.finish()
    first.send(FrameKind.TREE)
    for thread in (builder, *ends):
        thread.join(10)
        assert not thread.is_alive()
    assert list(state.iterdir()) == []


def test_a_lane_that_breaks_ends_the_move() -> None:
    first, _ = pair()
    broken, theirs = pair()
    ours = Lanes()
    theirs.open_stream()
    theirs.send(FrameKind.LANE)
    ours.open(1, MOVE, lambda: broken)
    theirs.close()
    with contextlib.closing(ours), pytest.raises(MigrationError, match="connection broke") as raised:
        ours.send(PageStream(first, buffer_of_pages()), (0, 0), groups(CHUNK_PAGES), read)
    assert raised.value.survivor is Survivor.SOURCE


def test_what_fails_in_a_lane_fails_the_move() -> None:
    first, _ = pair()
    lane, theirs = pair()
    ours = Lanes()
    theirs.open_stream()
    theirs.send(FrameKind.LANE)
    ours.open(1, MOVE, lambda: lane)

    def broken(runs: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
        raise ValueError((runs, len(into)))

    # Pages that were never sent must not count as sent.
    with contextlib.closing(ours), pytest.raises(ValueError):  # noqa: PT011
        ours.send(Idle(first, buffer_of_pages()), (0, 0), groups(CHUNK_PAGES), broken)


def test_a_lane_that_stalls_is_not_waited_for_when_the_user_gives_up() -> None:
    asked = threading.Event()

    def check() -> None:
        asked.set()
        raise KeyboardInterrupt

    first, _ = pair()
    stalled, theirs = pair()
    ours = Lanes(check)
    theirs.open_stream()
    theirs.send(FrameKind.LANE)
    ours.open(1, MOVE, lambda: stalled)
    idle = Idle(first, buffer_of_pages())
    with contextlib.closing(ours), pytest.raises(KeyboardInterrupt):
        ours.send(idle, (0, 0), groups(PAGES), read)
    assert asked.is_set()


def test_nobody_waits_for_a_lane_of_an_unknown_move(state: Path) -> None:
    ours, theirs = pair()
    with contextlib.closing(ours), pytest.raises(ImageError, match="no move of this name"):
        lanes.relay(theirs, MOVE)
    assert list(state.iterdir()) == []


def test_a_tree_must_not_come_while_a_lane_is_open(state: Path) -> None:
    first, there = pair()
    with contextlib.closing(Meeting(MOVE)) as made:
        ends = list[threading.Thread]()
        ours = Lanes()
        opened = threading.Thread(target=lambda: ours.open(1, MOVE, lambda: relayed(ends)))
        opened.start()
        first.send(FrameKind.ROUND)
        while not made._lanes:
            made.turn(there, Memory())
        opened.join()
        with pytest.raises(ImageError, match="further connections"):
            made.finish()
    ours.close()
    ends[0].join(10)
    assert not ends[0].is_alive()
    assert list(state.iterdir()) == []


def test_what_a_killed_builder_left_is_swept(state: Path) -> None:
    made = Meeting(MOVE)
    lanes.sweep()
    assert [path.name for path in state.iterdir()] == [f"{MOVE}.lanes"]
    made._listener.close()
    lanes.sweep()
    assert list(state.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "there", "count"),
    [
        (Options(connections=3), 1, 3),
        (Options(connections=100), 64, 8),
        (Options(connections=3, bandwidth_bytes_per_s=1e6), 64, 1),
        (Options(bandwidth_bytes_per_s=1e6), 64, 1),
        (Options(), 2, 1),
        (Options(), 64, 4),
    ],
)
def test_there_are_as_many_as_cores_allow(
    options: Options, there: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert lanes.connections(options, there) == count
