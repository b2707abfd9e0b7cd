"""Pipes and fifos: pipe(7), fifo(7).

One entry holds a whole pipe: every open end, what was written and not yet read, and the capacity.
The content is copied out by tee(2), which takes nothing away. A pipe whose bytes were written in
packet mode (O_DIRECT) hands them out packet by packet, and does so again.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import DestinationError, ImageError
from godwit.linux import pipe
from godwit.resources import fifo
from godwit.resources.base import (
    FileKind,
    Finding,
    OpenFile,
    RestoreContext,
    Tree,
    moves,
    refuse_outside_holders,
)
from godwit.resources.fifo import Fifo
from godwit.types import Fd, FileId, OwnedFd

O_LARGEFILE = 0o100000  # os.O_LARGEFILE is 0 on 64 bits, the kernel's flag is not
O_PATH = 0o10000000
_CAPACITY_MAX = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeEnd:
    """An open end of a pipe."""

    file_id: FileId
    access: int  # O_RDONLY, O_WRONLY, or O_RDWR when opened through /proc or as a fifo
    packet_mode: bool  # O_DIRECT: each write is a packet
    reopened: bool  # opened by name, not made by pipe(2): shows O_LARGEFILE
    hung_up: bool  # a reader that was told that all writers are gone


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeEntry:
    """A pipe in an image."""

    ends: tuple[PipeEnd, ...]
    capacity_bytes: int  # F_GETPIPE_SZ
    unread: tuple[bytes, ...]  # oldest first; one piece, unless packets
    packets: bool  # the pieces are packets
    named: Fifo | None = None  # None: a pipe without a name

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open files this restores."""
        return tuple(end.file_id for end in self.ends)


def _access(file: OpenFile) -> int:
    return file.info.flags & os.O_ACCMODE


def _what(file: OpenFile) -> str:
    return "pipe" if file.link.startswith("pipe:[") else "fifo"


def _can_read(access: int) -> bool:
    return access in (os.O_RDONLY, os.O_RDWR)


def _can_write(access: int) -> bool:
    return access in (os.O_WRONLY, os.O_RDWR)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    return stat.S_ISFIFO(file.mode) and not file.info.flags & O_PATH


def inspect(file: OpenFile, tree: Tree) -> Finding:
    """Find that it moves, if all its ends do."""
    return moves(file, _what(file), lambda: refuse_outside_holders(file, tree, _what(file)))


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[PipeEntry]:
    """Note every pipe once, with its content; nothing is taken out of it."""
    pipes: dict[tuple[int, int], list[OpenFile]] = {}
    for file in files:
        refuse_outside_holders(file, tree, _what(file))
        pipes.setdefault((file.device, file.inode), []).append(file)
    return [_entry(ends) for ends in pipes.values()]


def _entry(files: Sequence[OpenFile]) -> PipeEntry:
    first = files[0]
    packet_mode = any(_can_write(_access(file)) and file.info.flags & os.O_DIRECT for file in files)
    reader = next((file for file in files if _can_read(_access(file))), None)
    with first.duplicate() as fd:
        capacity_bytes = pipe.capacity_bytes(fd.number)
    # Without a reader nobody can ever get at the content.
    unread, packets = _content(reader, capacity_bytes, packet_mode=packet_mode) if reader else ((), False)
    return PipeEntry(
        ends=tuple(_end(file) for file in files),
        capacity_bytes=capacity_bytes,
        unread=unread,
        packets=packets,
        named=fifo.collect(first) if _what(first) == "fifo" else None,
    )


def _end(file: OpenFile) -> PipeEnd:
    access = _access(file)
    return PipeEnd(
        file_id=file.file_id,
        access=access,
        packet_mode=bool(file.info.flags & os.O_DIRECT),
        reopened=bool(file.info.flags & O_LARGEFILE),
        hung_up=access == os.O_RDONLY and _is_hung_up(file),
    )


def _is_hung_up(file: OpenFile) -> bool:
    with file.duplicate() as fd:
        poll = select.poll()
        poll.register(fd.number, select.POLLIN)
        return any(events & select.POLLHUP for _, events in poll.poll(0))


def _copy(source: Fd, length_bytes: int, capacity_bytes: int) -> tuple[OwnedFd, OwnedFd]:
    """Return a scratch pipe with the same content."""
    reader, writer = pipe.pipe(os.O_NONBLOCK)
    try:
        pipe.set_capacity(writer.number, capacity_bytes)
        copied = 0
        while copied < length_bytes:
            # One call copies what there is: another would copy the beginning again.
            copied = pipe.tee(source, writer.number, length_bytes)
            if copied < length_bytes:
                raise BlockingIOError(f"tee copied {copied} of {length_bytes} bytes")
    except BaseException:
        reader.close()
        writer.close()
        raise
    return reader, writer


def _content(reader: OpenFile, capacity_bytes: int, *, packet_mode: bool) -> tuple[tuple[bytes, ...], bool]:
    """Return the pieces that reads would return one by one, and whether they are packets."""
    with reader.duplicate() as fd:
        total = pipe.unread_bytes(fd.number)
        if not total:
            return (), packet_mode
        copy, feeder = _copy(fd.number, total, capacity_bytes)
        with copy, feeder:
            pieces = _read_pieces(copy.number, total)
        copy, feeder = _copy(fd.number, total, capacity_bytes)
        with copy, feeder:
            packets = [_is_packet(copy.number, len(piece), packet_mode=packet_mode) for piece in pieces]
    if len(set(packets)) > 1 or (len(pieces) > 1 and not packets[0]):
        raise reader.refuse(
            _what(reader), "packets and plain bytes wait in it together", "let the program read them"
        )
    return pieces, packets[0]


def _read_pieces(fd: Fd, total: int) -> tuple[bytes, ...]:
    pieces: list[bytes] = []
    while total:
        pieces.append(os.read(fd, total))
        total -= len(pieces[-1])
    return tuple(pieces)


def _is_packet(fd: Fd, length_bytes: int, *, packet_mode: bool) -> bool:
    """Read one piece off a copy and tell whether it is a packet: reading a part of one drops the rest."""
    before = pipe.unread_bytes(fd)
    os.read(fd, 1)
    if length_bytes == 1:
        return packet_mode
    if pipe.unread_bytes(fd) == before - length_bytes:
        return True
    os.read(fd, length_bytes - 1)
    return False


def restore(entry: PipeEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:
    """Make the pipe, fill it and open every end of it."""
    _check(entry)
    reader, writer = pipe.pipe() if entry.named is None else fifo.open_both_ends(entry.named, context.root)
    made: dict[FileId, OwnedFd] = {}
    with reader, writer:
        try:
            if pipe.capacity_bytes(writer.number) != entry.capacity_bytes:
                pipe.set_capacity(writer.number, entry.capacity_bytes)
            if not _is_filled(reader, entry):
                _fill(writer, entry)
            _open_ends(entry, reader, writer, made)
            _set_packet_mode(entry.ends, made)
        except BaseException:
            for fd in made.values():
                fd.close()
            raise
    return made


def _check(entry: PipeEntry) -> None:
    accesses = {end.access for end in entry.ends}
    if not accesses or accesses - {os.O_RDONLY, os.O_WRONLY, os.O_RDWR}:
        raise ImageError(f"pipe {entry.file_ids} has ends that are neither read nor written")
    if not 0 < entry.capacity_bytes < _CAPACITY_MAX or sum(map(len, entry.unread)) > entry.capacity_bytes:
        raise ImageError(f"pipe {entry.file_ids} does not hold what is in it")


def _is_filled(reader: OwnedFd, entry: PipeEntry) -> bool:
    """Tell whether the content is in the pipe already.

    A fifo on a file system that source and destination share within one kernel is one pipe, whose
    content is there until the source lets go of it.
    """
    total = pipe.unread_bytes(reader.number) if entry.named is not None else 0
    if total == 0:
        return False
    copy, rest = _copy(reader.number, total, entry.capacity_bytes)
    with copy, rest:
        found = _read_pieces(copy.number, total)
    if b"".join(found) == b"".join(entry.unread):
        return True
    name = os.fsdecode(entry.named.path) if entry.named else ""
    raise DestinationError(
        f"the fifo {name} holds {total} bytes of somebody else",
        remedy="empty it, or end who uses it there",
    )


def _fill(writer: OwnedFd, entry: PipeEntry) -> None:
    if entry.packets:
        _set_flags(writer.number, on=os.O_DIRECT | os.O_NONBLOCK)
    else:
        _set_flags(writer.number, on=os.O_NONBLOCK)
    try:
        for piece in entry.unread:
            if os.write(writer.number, piece) != len(piece):
                raise ImageError(f"pipe {entry.file_ids} does not hold what is in it")
    finally:
        _set_flags(writer.number, off=os.O_DIRECT | os.O_NONBLOCK)


def _set_flags(fd: Fd, *, on: int = 0, off: int = 0) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~off | on)


def _open_ends(entry: PipeEntry, reader: OwnedFd, writer: OwnedFd, made: dict[FileId, OwnedFd]) -> None:
    """Open all ends into `made`; `reader` and `writer` are used up, one way or the other."""
    path = f"/proc/self/fd/{reader.number}"
    late: list[PipeEnd] = []
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as keeper:
        again = f"/proc/self/fd/{keeper.number}"
        originals = {} if entry.named else {os.O_RDONLY: reader, os.O_WRONLY: writer}
        for end in _by_origin(entry.ends):
            if end.access in originals and not end.reopened:
                made[end.file_id] = originals.pop(end.access).release()
            elif entry.named and end.access == os.O_RDONLY and not end.hung_up:
                late.append(end)
            else:
                made[end.file_id] = _reopen(again, end)
        for fd in (reader, writer):
            fd.close()
        # A reader that comes when no writer is there is told of a hang-up only once one came and went.
        for end in late:
            made[end.file_id] = _reopen(again, end)


def _by_origin(ends: Iterable[PipeEnd]) -> list[PipeEnd]:
    return sorted(ends, key=lambda end: end.reopened)


def _reopen(path: str, end: PipeEnd) -> OwnedFd:
    fd = OwnedFd(os.open(path, end.access | os.O_NONBLOCK | os.O_CLOEXEC))
    _set_flags(fd.number, off=os.O_NONBLOCK)
    return fd


def _set_packet_mode(ends: Iterable[PipeEnd], made: Mapping[FileId, OwnedFd]) -> None:
    for end in ends:
        if end.packet_mode:
            _set_flags(made[end.file_id].number, on=os.O_DIRECT)


KIND = FileKind(
    name="pipe",
    tag=14,
    entry=PipeEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
