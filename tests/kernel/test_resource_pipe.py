"""Pipes and fifos move with what is in them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
from pathlib import Path

import pytest

from godwit.errors import DestinationError, ImageError, UnsupportedStateError
from godwit.linux import pipe as kernel
from godwit.resources import pipe
from godwit.resources.base import Disposition
from godwit.resources.fifo import Fifo
from godwit.resources.pipe import PipeEnd, PipeEntry
from godwit.types import FileId, OwnedFd
from tests.kernel.openfiles import Builder, flags_shown, held, moved, readiness, restored, same


def read_all(fd: OwnedFd, piece_bytes: int = 1 << 20) -> list[bytes]:
    os.set_blocking(fd.number, False)
    pieces: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(fd.number, piece_bytes):
            pieces.append(piece)
    return pieces


@pytest.mark.parametrize("size", [0, 1, 75, 4096, 65536])
def test_bytes_in_a_pipe_are_read_after_the_move_and_stay_with_the_twin(size: int) -> None:
    reader, writer = os.pipe()
    content = os.urandom(size)
    os.write(writer, content)
    with held(reader, writer) as child, restored(pipe.KIND, child) as builder, child.twin(reader) as twin:
        mine = moved(child, builder, reader)
        same(readiness, mine, twin)
        same(flags_shown, mine, twin)
        assert read_all(mine) == read_all(twin) == ([content] if content else [])
        os.write(moved(child, builder, writer).number, b"later")
        assert os.read(mine.number, 99) == b"later"


def test_a_pipe_of_another_size_keeps_it_and_can_be_full() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(writer, kernel.F_SETPIPE_SZ, 1 << 18)
    content = os.urandom(1 << 18)
    assert os.write(writer, content) == len(content)
    with held(reader, writer) as child, restored(pipe.KIND, child) as builder, child.twin(writer) as twin:
        mine = moved(child, builder, writer)
        same(readiness, mine, twin)
        assert kernel.capacity_bytes(mine.number) == 1 << 18
        assert read_all(moved(child, builder, reader)) == [content]


@pytest.mark.parametrize("sizes", [[1], [1, 1], [5], [5, 1, 4096, 3], [4096] * 16])
def test_packets_stay_packets(sizes: list[int]) -> None:
    reader, writer = os.pipe2(os.O_DIRECT)
    packets = [os.urandom(size) for size in sizes]
    for packet in packets:
        os.write(writer, packet)
    with held(reader, writer) as child, restored(pipe.KIND, child) as builder, child.twin(reader) as twin:
        mine = moved(child, builder, reader)
        assert os.read(mine.number, 2) == os.read(twin.number, 2) == packets[0][:2]
        assert read_all(mine) == read_all(twin) == packets[1:]
        for packet in (b"ab", b"cd"):
            os.write(moved(child, builder, writer).number, packet)
        assert read_all(mine) == [b"ab", b"cd"]


def test_packets_outlive_their_writer() -> None:
    reader, writer = os.pipe2(os.O_DIRECT)
    os.write(writer, b"abc")
    os.close(writer)
    with held(reader) as child, restored(pipe.KIND, child) as builder:
        mine = moved(child, builder, reader)
        assert [os.read(mine.number, 2), os.read(mine.number, 2)] == [b"ab", b""]


def test_packets_and_plain_bytes_together_are_refused() -> None:
    reader, writer = os.pipe2(os.O_DIRECT)
    os.write(writer, b"packet")
    fcntl.fcntl(writer, fcntl.F_SETFL, 0)
    os.write(writer, b"plain")
    with held(reader, writer) as child, pytest.raises(UnsupportedStateError, match="together"):
        pipe.collect(child.files, child)


def test_a_reader_whose_writers_are_gone_reads_the_rest_and_then_the_end() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"rest")
    os.close(writer)
    with held(reader) as child, restored(pipe.KIND, child) as builder, child.twin(reader) as twin:
        mine = moved(child, builder, reader)
        same(readiness, mine, twin)
        assert [os.read(mine.number, 99), os.read(mine.number, 99)] == [b"rest", b""]


def test_a_writer_whose_readers_are_gone_is_told() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with held(writer) as child, restored(pipe.KIND, child) as builder, child.twin(writer) as twin:
        mine = moved(child, builder, writer)
        same(readiness, mine, twin)
        with pytest.raises(BrokenPipeError):
            os.write(mine.number, b"x")


def test_ends_opened_again_through_proc_move_too() -> None:
    reader, writer = os.pipe()
    both = os.open(f"/proc/self/fd/{reader}", os.O_RDWR)
    second = os.open(f"/proc/self/fd/{reader}", os.O_RDONLY | os.O_NONBLOCK)
    os.write(both, b"x")
    fds = (reader, writer, both, second)
    with held(*fds) as child, restored(pipe.KIND, child) as builder:
        assert len(child.files) == len(builder.files) == 4
        for fd in (reader, writer, both):
            with child.twin(fd) as twin:
                same(flags_shown, moved(child, builder, fd), twin)
        assert os.read(moved(child, builder, second).number, 9) == b"x"
        for fd in (writer, both):
            os.write(moved(child, builder, fd).number, b"y")
        assert os.read(moved(child, builder, reader).number, 9) == b"yy"


def test_a_shared_end_is_one_open_file() -> None:
    reader, writer = os.pipe()
    again = os.dup(writer)
    with held(reader, writer, again) as child, restored(pipe.KIND, child) as builder:
        assert len(builder.files) == 2
        moved(child, builder, again).close()
        assert os.read(moved(child, builder, reader).number, 1) == b""


def test_a_pipe_to_somebody_who_stays_is_refused_by_pid() -> None:
    reader, writer = os.pipe()
    with OwnedFd(reader), held(writer, close=False) as child:
        os.close(writer)
        finding = pipe.inspect(child.at(writer), child)
        assert finding.disposition is Disposition.REFUSE
        assert f"pid {os.getpid()} (fd {reader})" in finding.why
        assert str(os.getpid()) in finding.remedy
        with pytest.raises(UnsupportedStateError):
            pipe.collect(child.files, child)
    # Nobody else: it moves.
    with held(*os.pipe()) as child:
        assert pipe.inspect(child.files[0], child).disposition is Disposition.MOVE


def fifo_ends(path: Path, *flags: int) -> list[int]:
    os.mkfifo(path, 0o640)
    with OwnedFd(os.open(path, os.O_RDWR)):
        return [os.open(path, flag | os.O_NONBLOCK) for flag in flags]


@pytest.mark.parametrize("present", [True, False])
def test_a_fifo_moves_with_its_name(tmp_path: Path, present: bool) -> None:
    path = tmp_path / "fifo"
    reader, writer = fifo_ends(path, os.O_RDONLY, os.O_WRONLY)
    os.write(writer, b"waiting")
    with held(reader, writer) as child:
        entry = pipe.collect(child.files, child)[0]
    if not present:
        path.unlink()
    made = pipe.restore(entry, Builder())
    with made[FileId(1)] as mine, made[FileId(2)] as other:
        assert os.readlink(f"/proc/self/fd/{mine.number}") == str(path)
        assert os.stat(path).st_mode & 0o777 == 0o640
        assert read_all(mine) == [b"waiting"]
        os.write(other.number, b"more")
        with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as visitor:
            assert os.read(visitor.number, 9) == b"more"


def test_a_deleted_fifo_moves_too(tmp_path: Path) -> None:
    reader, writer = fifo_ends(tmp_path / "fifo", os.O_RDONLY, os.O_WRONLY)
    os.write(writer, b"waiting")
    (tmp_path / "fifo").unlink()
    with held(reader, writer) as child, restored(pipe.KIND, child) as builder:
        assert read_all(moved(child, builder, reader)) == [b"waiting"]
        assert os.readlink(f"/proc/self/fd/{moved(child, builder, reader).number}").endswith(" (deleted)")
        assert not (tmp_path / "fifo").exists()


@pytest.mark.parametrize("had_writer", [True, False])
def test_a_fifo_reader_that_never_had_a_writer_is_not_told_of_a_hang_up(
    tmp_path: Path, had_writer: bool
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if had_writer:
        os.close(os.open(path, os.O_WRONLY))
    with held(reader) as child:
        entry = pipe.collect(child.files, child)[0]
        # A destination of its own: with the same name here both would be one fifo.
        path.rename(tmp_path / "source")
        with pipe.restore(entry, Builder())[FileId(1)] as mine, child.twin(reader) as twin:
            same(readiness, mine, twin)
            assert bool(readiness(mine) & select.POLLHUP) == had_writer


def test_a_fifo_whose_name_is_taken_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    named = Fifo(path=bytes(path), deleted=False, mode=0o600, uid=0, gid=0)
    end = PipeEnd(file_id=FileId(1), access=os.O_RDONLY, packet_mode=False, reopened=True, hung_up=False)
    entry = PipeEntry(ends=(end,), capacity_bytes=4096, unread=(), packets=False, named=named)
    with pytest.raises(DestinationError, match="no fifo"):
        pipe.restore(entry, Builder())
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("access", "capacity_bytes", "unread"),
    [(3, 4096, ()), (0, 0, ()), (0, 2**40, ()), (0, 4096, (b"x" * 4097,))],
)
def test_an_impossible_pipe_from_a_peer_is_refused(
    access: int, capacity_bytes: int, unread: tuple[bytes, ...]
) -> None:
    end = PipeEnd(file_id=FileId(1), access=access, packet_mode=False, reopened=False, hung_up=False)
    with pytest.raises(ImageError):
        pipe.restore(
            PipeEntry(ends=(end,), capacity_bytes=capacity_bytes, unread=unread, packets=False), Builder()
        )
