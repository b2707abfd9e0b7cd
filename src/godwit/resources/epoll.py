"""Sets of watched files: epoll(7).

An interest belongs to a file and to the number it had when it was added. So it can only be added
again by a process that has the file under that number: see `attach`. Whether an edge was already
reported is not shown anywhere; after a move it may be reported once more, never once less.
"""

from __future__ import annotations

import errno
import fcntl
import select
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import DestinationError, ImageError
from godwit.linux import abi, epoll, kcmp
from godwit.procfs.fdinfo import EpollLine
from godwit.resources.base import AttachContext, FileKind, Finding, OpenFile, RestoreContext, Tree, moves
from godwit.types import Fd, FileId, OwnedFd, Pid

_WHAT = "epoll set"
_NUMBER_MAX = 2**31 - 1
_DISARMED_WHY = "a watch of one shot has fired and waits to be armed again on a file that is not ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpollWatch:
    """One interest of an epoll set."""

    file_id: FileId
    number: int  # the file's descriptor when it was added; may be closed or something else now
    events: int  # EPOLL*; no readiness bit: EPOLLONESHOT has fired
    data: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpollEntry:
    """An epoll set in an image."""

    file_id: FileId
    watches: tuple[EpollWatch, ...]

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open file this restores."""
        return (self.file_id,)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    return file.link == "anon_inode:[eventpoll]"


def _is_watched(file: OpenFile, nth: int, line: EpollLine, candidate: OpenFile) -> bool:
    watcher, fd = file.holders[0]
    holder, number = candidate.holders[0]
    return kcmp.watches_file(watcher, fd, line.tfd, nth, holder, number)


def _candidates(file: OpenFile, line: EpollLine, tree: Tree) -> Iterator[OpenFile]:
    """Yield the files of the tree, the likeliest first."""
    obvious = [tree.file_at(pid, line.tfd) for pid, _ in file.holders]
    yield from (found for found in obvious if found is not None)
    # Anonymous files share one inode, and some file systems tell stat(2) another device.
    yield from (found for found in tree.files if found.inode == line.ino)


def _watched(file: OpenFile, nth: int, line: EpollLine, tree: Tree) -> OpenFile:
    for candidate in _candidates(file, line, tree):
        if not _is_watched(file, nth, line, candidate):
            continue
        if not {pid for pid, _ in file.holders} & {pid for pid, _ in candidate.holders}:
            raise file.refuse(
                _WHAT,
                f"no process that has it still has the file it watches as fd {line.tfd}",
                "close one of the two",
            )
        return candidate
    raise file.refuse(
        _WHAT,
        f"the file it watches as fd {line.tfd} is not open in any process that moves",
        "end the process that keeps that file open",
    )


def _watches(file: OpenFile, tree: Tree) -> Iterator[tuple[EpollLine, OpenFile]]:
    seen: dict[Fd, int] = {}
    for line in file.info.epoll:
        nth = seen.get(line.tfd, 0)
        seen[line.tfd] = nth + 1
        yield line, _watched(file, nth, line, tree)


def _is_ready(file: OpenFile) -> bool:
    with file.duplicate() as fd:
        poll = select.poll()
        poll.register(fd.number, epoll.READINESS & 0x7FFF)
        return bool(poll.poll(0))


def _entry(file: OpenFile, tree: Tree) -> EpollEntry:
    watches: list[EpollWatch] = []
    for line, target in _watches(file, tree):
        if not line.events & epoll.READINESS and not _is_ready(target):
            raise file.refuse(_WHAT, _DISARMED_WHY, "try again in a moment")
        watches.append(
            EpollWatch(file_id=target.file_id, number=line.tfd, events=line.events, data=line.data)
        )
    return EpollEntry(file_id=file.file_id, watches=tuple(watches))


def inspect(file: OpenFile, tree: Tree) -> Finding:
    """Find that it moves, if what it watches does."""

    def check() -> None:
        for _ in _watches(file, tree):
            pass

    return moves(file, _WHAT, check)


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[EpollEntry]:
    """Note the interests, and which files they are in."""
    return [_entry(file, tree) for file in files]


def restore(entry: EpollEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:  # noqa: ARG001
    """Make an empty set; `attach` fills it."""
    return {entry.file_id: OwnedFd(abi.syscall("epoll_create1", select.EPOLL_CLOEXEC))}


def attach(entry: EpollEntry, context: AttachContext) -> None:
    """Have the processes add the interests themselves, each under its old number."""
    # Spent watches first: they are spent again by waiting, when no other could be reported.
    for watch in sorted(entry.watches, key=lambda watch: bool(watch.events & epoll.READINESS)):
        pid, epoll_fd, fd = _place(entry, watch, context)
        if fd == watch.number:
            _add(context, pid, epoll_fd, watch)
        else:
            _add_under_old_number(context, pid, epoll_fd, fd, watch)


def _place(entry: EpollEntry, watch: EpollWatch, context: AttachContext) -> tuple[Pid, Fd, Fd]:
    """Return a process, the set's number and the watched file's number there: the old one if it can be."""
    sets = dict(context.holders(entry.file_id))
    places = [(pid, sets[pid], fd) for pid, fd in context.holders(watch.file_id) if pid in sets]
    if not places or not 0 <= watch.number <= _NUMBER_MAX:
        raise ImageError(f"epoll set {entry.file_id} watches fd {watch.number}, which no process can add")
    return min(places, key=lambda place: place[2] != watch.number)


def _add(context: AttachContext, pid: Pid, epoll_fd: Fd, watch: EpollWatch) -> None:
    spent = not watch.events & epoll.READINESS
    events = watch.events | epoll.READINESS if spent else watch.events
    argument = epoll.event(events, watch.data)
    context.call(pid, "epoll_ctl", epoll_fd, epoll.EPOLL_CTL_ADD, watch.number, argument)
    if spent and context.call(pid, "epoll_pwait", epoll_fd, bytes(epoll.EVENT.size), 1, 0, 0, 8) != 1:
        raise DestinationError(f"fd {watch.number} of pid {pid} (inside) is not ready as it was")


def _add_under_old_number(context: AttachContext, pid: Pid, epoll_fd: Fd, fd: Fd, watch: EpollWatch) -> None:
    """Give the file its old number for as long as it takes to add it.

    If the number is in use, its file lives on under another one meanwhile. Closing it drops the
    process's record locks on that file, so those are restored after this.
    """
    flags = _descriptor_flags(context, pid, watch.number)
    if flags is None:
        _lend_number(context, pid, epoll_fd, fd, watch)
        context.call(pid, "close", watch.number)
        return
    above = max(watch.number, epoll_fd, fd) + 1
    saved = Fd(context.call(pid, "fcntl", watch.number, fcntl.F_DUPFD_CLOEXEC, above))
    inner_epoll = saved if epoll_fd == watch.number else epoll_fd
    _lend_number(context, pid, inner_epoll, fd, watch)
    context.call(pid, "dup3", saved, watch.number, _dup3_flags(flags))
    context.call(pid, "close", saved)


def _lend_number(context: AttachContext, pid: Pid, epoll_fd: Fd, fd: Fd, watch: EpollWatch) -> None:
    context.call(pid, "dup3", fd, watch.number, select.EPOLL_CLOEXEC)
    _add(context, pid, epoll_fd, watch)


def _dup3_flags(descriptor_flags: int) -> int:
    return select.EPOLL_CLOEXEC if descriptor_flags & fcntl.FD_CLOEXEC else 0  # the same bit as O_CLOEXEC


def _descriptor_flags(context: AttachContext, pid: Pid, number: int) -> int | None:
    try:
        return context.call(pid, "fcntl", number, fcntl.F_GETFD, 0)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return None


KIND = FileKind(
    name="epoll",
    tag=13,
    entry=EpollEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
    attach=attach,
)
