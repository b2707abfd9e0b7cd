"""What the pages of running processes still lack, kept so that a successor can go on from it.

Every change is appended to a file before anything else happens, so whoever comes after a dead pager knows as
much as it did. The kernel's messages are read into the file itself: who dies before they are noted takes none
along. Only the userfaultfd of a child that was just born may die with its reader.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from godwit.engine.ranges import RangeSet
from godwit.errors import BusyError, ImageError
from godwit.linux import userfaultfd
from godwit.linux.pause import pause
from godwit.linux.userfaultfd import UFFD_MSG_BYTES, Message
from godwit.migrate import journal
from godwit.types import Fd, OwnedFd

_HEAD: Final = struct.Struct("<8sIIQ")  # magic, pid of the pager, messages are being read, epoch
_MAGIC: Final = b"GWPEND01"
_HEAD_BYTES: Final = mmap.PAGESIZE
_FLAG_AT: Final = 12
_READING: Final = struct.Struct("<QQ")  # number of the space, length of the file before anything is noted
_READING_AT: Final = _HEAD.size
_RELEASED: Final = struct.Struct("<I")
_RELEASED_AT: Final = _READING_AT + _READING.size
_MESSAGES_AT: Final = 1024
_MESSAGES: Final = 64
_RECORD: Final = struct.Struct("<qqqqq")
_SPACE, _LEFT, _GONE, _MOVED, _FORKED, _DEAD = range(1, 7)
_TAKEN_OVER_WITHIN_S: Final = 5.0


@dataclass(slots=True)
class Space:
    """One address space that lacks pages."""

    number: int
    source: int  # which process at the source has them: index as in the last TREE
    kept_at: int  # number of the userfaultfd in the pod's init; -1: not there
    pending: dict[int, RangeSet] = field(default_factory=dict[int, RangeSet])
    """By how far a page has been moved since (mremap): its ranges, where they are now."""
    dead: bool = False

    def source_of(self, address: int) -> int | None:
        """Return where at the source a page is that is pending here; None if it is not."""
        for shift, found in self.pending.items():
            if found.within(address, address + 1):
                return address - shift
        return None

    def lacks(self) -> bool:
        """Tell whether anything is pending."""
        return not self.dead and any(self.pending.values())


class Pending:
    """All address spaces of a move that lack pages, and the file that says so. One pager at a time."""

    def __init__(self, file: OwnedFd, head: mmap.mmap) -> None:
        self._file = file
        self._head = head
        self._length = os.fstat(file.number).st_size
        self.spaces: dict[int, Space] = {}

    # --- the file -----------------------------------------------------------------------------

    @classmethod
    def create(cls, migration: str) -> Self:
        """Begin a file, as the pager of the move."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        file = OwnedFd(os.open(path_of(migration), flags, 0o600))
        try:
            fcntl.flock(file.number, fcntl.LOCK_EX)
            # What is written through the map must have its room: a full disk would kill us with SIGBUS.
            os.posix_fallocate(file.number, 0, _HEAD_BYTES)
            return cls._mapped(file)
        except BaseException:
            file.close()
            remove(migration)
            raise

    @classmethod
    def take_over(cls, migration: str) -> Self:
        """Become the pager of a move in place of one that is dead or has lost its line.

        Raises:
            FileNotFoundError: Nothing is pending for that move.
            BusyError: The other one does not let go.
        """
        file = OwnedFd(os.open(path_of(migration), os.O_RDWR | os.O_APPEND | os.O_CLOEXEC))
        deadline = time.monotonic() + _TAKEN_OVER_WITHIN_S
        while True:
            try:
                fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _end_pager(file)
                if time.monotonic() > deadline:
                    file.close()
                    raise BusyError("another pager serves this move and does not let go") from None
                pause(0.01)
            else:
                break
        made = cls._mapped(file)
        made._replay()
        return made

    @classmethod
    def _mapped(cls, file: OwnedFd) -> Self:
        head = mmap.mmap(file.number, _HEAD_BYTES)
        _, _, reading, epoch = _HEAD.unpack_from(head)
        _HEAD.pack_into(head, 0, _MAGIC, os.getpid(), reading, epoch + 1)
        return cls(file, head)

    @property
    def epoch(self) -> int:
        """How many pagers there have been."""
        return int(_HEAD.unpack_from(self._head)[3])

    @property
    def torn(self) -> bool:
        """A pager died with a child's userfaultfd that nobody else had: the child lacks pages for good."""
        return bool(_HEAD.unpack_from(self._head)[2])

    @property
    def released(self) -> bool:
        """Whether everything was let run, before pages followed or while they do."""
        return bool(_RELEASED.unpack_from(self._head, _RELEASED_AT)[0])

    def note_released(self) -> None:
        """Note that everything runs. Another thread may be at work with the rest of this."""
        with contextlib.suppress(ValueError, TypeError):  # Closed: the pager has ended already.
            _RELEASED.pack_into(self._head, _RELEASED_AT, 1)

    @contextlib.contextmanager
    def reading(self, space: Space, uffd: Fd) -> Iterator[list[Message]]:
        """Read the messages that wait. Unless the block notes all of them, a successor notes them anew."""
        with _undisturbed(), memoryview(self._head) as head:
            room = head[_MESSAGES_AT : _MESSAGES_AT + _MESSAGES * UFFD_MSG_BYTES]
            room[:] = bytes(len(room))
            _READING.pack_into(head, _READING_AT, space.number, self._length)
            struct.pack_into("<I", head, _FLAG_AT, 1)
            with room, contextlib.suppress(BlockingIOError):
                os.readv(uffd, [room])
            yield self._messages()
            struct.pack_into("<I", head, _FLAG_AT, 0)

    def _messages(self) -> list[Message]:
        return userfaultfd.messages(self._head[_MESSAGES_AT : _MESSAGES_AT + _MESSAGES * UFFD_MSG_BYTES])

    def close(self) -> None:
        """Let go; what is pending stays pending."""
        self._head.close()
        self._file.close()

    def _note(self, kind: int, *words: int) -> None:
        written = os.write(self._file.number, _RECORD.pack(kind, *words, *[0] * (4 - len(words))))
        if written < _RECORD.size:
            os.ftruncate(self._file.number, self._length)
            raise OSError(errno.ENOSPC, "no room for the list of pending pages")
        self._length += written

    def _replay(self) -> None:
        number, length = _READING.unpack_from(self._head, _READING_AT)
        if not self.torn:
            # Half a record is none: the disk was full, or the machine failed.
            length = self._length - (self._length - _HEAD_BYTES) % _RECORD.size
        after = os.pread(self._file.number, self._length, length)
        os.ftruncate(self._file.number, length)
        self._length = length
        self._apply(os.pread(self._file.number, length - _HEAD_BYTES, _HEAD_BYTES))
        if self.torn:
            self._note_again(self.spaces[number], after)

    def _note_again(self, space: Space, noted: bytes) -> None:
        """Note all messages that a dead pager had read, in place of what it came to note of them."""
        whole = noted[: len(noted) // _RECORD.size * _RECORD.size]
        kept_at = [words[2] for kind, *words in _RECORD.iter_unpack(whole) if kind == _FORKED]
        for message in self._messages():
            if message.event != userfaultfd.UFFD_EVENT_FORK:
                self.note(space, message)
            elif kept_at:
                self.forked(space, kept_at.pop(0))
            else:
                return
        struct.pack_into("<I", self._head, _FLAG_AT, 0)

    def _apply(self, raw: bytes) -> None:
        apply = {
            _SPACE: self._apply_space,
            _LEFT: self._apply_left,
            _GONE: self._apply_gone,
            _MOVED: self._apply_moved,
            _FORKED: self._apply_forked,
            _DEAD: self._apply_dead,
        }
        for kind, *words in _RECORD.iter_unpack(raw):
            if kind not in apply:
                raise ImageError(f"the list of pending pages has a record of kind {kind}")
            apply[kind](*words)

    def wanting(self, source: int, start: int, end: int) -> tuple[Space, int, int, int] | None:
        """Return who lacks something of a range of a process at the source: space, shift, and which part."""
        for space in self.spaces.values():
            if space.source != source or space.dead:
                continue
            for shift, found in space.pending.items():
                parts = found.within(start + shift, end + shift)
                if parts:
                    return space, shift, *parts[0]
        return None

    # --- changes ------------------------------------------------------------------------------

    def add(self, source: int, kept_at: int) -> Space:
        """Begin an address space."""
        number = len(self.spaces)
        self._note(_SPACE, number, source, kept_at)
        self._apply_space(number, source, kept_at, 0)
        return self.spaces[number]

    def leave(self, space: Space, start: int, end: int) -> None:
        """Note a range that is pending."""
        self._note(_LEFT, space.number, start, end)
        self._apply_left(space.number, start, end, 0)

    def note(self, space: Space, message: Message) -> None:
        """Note what the kernel tells of an address space, but for faults and children."""
        match message.event:
            case userfaultfd.UFFD_EVENT_REMOVE | userfaultfd.UFFD_EVENT_UNMAP:
                self.gone(space, message.first, message.second)
            case userfaultfd.UFFD_EVENT_REMAP:
                self.moved(space, message.first, message.second, message.third)
            case userfaultfd.UFFD_EVENT_PAGEFAULT:
                pass
            case other:
                raise ImageError(f"the kernel tells of an event {other} that nobody asked for")

    def gone(self, space: Space, start: int, end: int) -> None:
        """Note a range that came, or that the program has given up."""
        self._note(_GONE, space.number, start, end)
        self._apply_gone(space.number, start, end, 0)

    def moved(self, space: Space, start: int, to: int, length: int) -> None:
        """Note that the program has moved a range."""
        self._note(_MOVED, space.number, start, to, length)
        self._apply_moved(space.number, start, to, length)

    def forked(self, parent: Space, kept_at: int) -> Space:
        """Note a child, which lacks what its parent lacks."""
        number = len(self.spaces)
        self._note(_FORKED, number, parent.number, kept_at)
        self._apply_forked(number, parent.number, kept_at, 0)
        return self.spaces[number]

    def dead(self, space: Space) -> None:
        """Note that an address space has ended."""
        self._note(_DEAD, space.number)
        self._apply_dead(space.number, 0, 0, 0)

    def _apply_space(self, number: int, source: int, kept_at: int, _: int) -> None:
        self.spaces[number] = Space(number, source, kept_at, {0: RangeSet()})

    def _apply_left(self, number: int, start: int, end: int, _: int) -> None:
        self.spaces[number].pending[0].add(start, end)

    def _apply_gone(self, number: int, start: int, end: int, _: int) -> None:
        for found in self.spaces[number].pending.values():
            found.remove(start, end)

    def _apply_moved(self, number: int, start: int, to: int, length: int) -> None:
        pending = self.spaces[number].pending
        # What was at the target has been unmapped; of what goes there, each part keeps its own history.
        taken = [(shift, found.remove(start, start + length)) for shift, found in pending.items()]
        for found in pending.values():
            found.remove(to, to + length)
        for shift, parts in taken:
            for first, beyond in parts:
                there = pending.setdefault(shift + to - start, RangeSet())
                there.add(first + to - start, beyond + to - start)

    def _apply_forked(self, number: int, parent: int, kept_at: int, _: int) -> None:
        known = self.spaces[parent]
        pending = {shift: found.copy() for shift, found in known.pending.items()}
        self.spaces[number] = Space(number, known.source, kept_at, pending)

    def _apply_dead(self, number: int, *_: int) -> None:
        self.spaces[number].dead = True


def path_of(migration: str) -> Path:
    """Return where the list of a move lies."""
    return journal.beside(migration, "pending")


def exists(migration: str) -> bool:
    """Tell whether pages of a move are still awaited here."""
    return path_of(migration).exists()


def remove(migration: str) -> None:
    """Forget a list: everything has come."""
    path_of(migration).unlink(missing_ok=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let whoever asks us to go wait until the block is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forgotten() -> Iterator[str]:
    """Yield the moves of which there is a list, and nobody at work with it."""
    for path in journal.directory().glob("*.pending"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path.stem


def _end_pager(file: OwnedFd) -> None:
    """Ask the pager that holds the file to go."""
    raw = os.pread(file.number, _HEAD.size, 0)
    magic, pid, _, _ = _HEAD.unpack(raw)
    if magic == _MAGIC and pid > 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
