"""Locks of the host's programs, which exclude those of home's programs and the other way round.

Who takes a lock wants to see what its last holder wrote: with the lock goes the word to the host to forget
what it keeps of the file, if that has changed.

At home each pair of file and lock owner has one open file description, with which it locks as fcntl(2)
does for a process: whatever descriptor it used, and until it closes any. flock(2) belongs to the open file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from functools import partial
from typing import Final

from godwit.linux import fuse, ofdlock, setfsuid
from godwit.linux.ofdlock import OFFSET_MAX, Range
from godwit.residual.homefiles.files import Files, OpenFile
from godwit.residual.homefiles.messages import After, Later, Parts, Request, fail, fields
from godwit.residual.homefiles.nodes import Node, Nodes, signature
from godwit.types import Fd, OwnedFd

_FLOCK_OF: Final = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}


class Owner:
    """What one owner has locked of one file."""

    __slots__ = ("fd", "files", "pid")

    def __init__(self, fd: OwnedFd, pid: int) -> None:
        self.fd = fd
        self.pid = pid  # at the host
        self.files: set[OpenFile] = set()  # through which it locked


class Locks:
    """The owners of locks, by file."""

    def __init__(self) -> None:
        self._owners: dict[int, dict[int, Owner]] = {}  # nodeid, lock_owner

    def owner(self, nodes: Nodes, file: OpenFile, ident: int, pid: int) -> Owner:
        """Return an owner, new or known, that is about to ask for a lock through `file`."""
        owners = self._owners.setdefault(file.node.nodeid, {})
        owner = owners.get(ident)
        if owner is None:
            owner = owners[ident] = Owner(_description(nodes, file), pid)
        owner.files.add(file)
        return owner

    def others(self, nodeid: int, owner: Owner) -> list[Owner]:
        """List the other owners of locks of a file."""
        return [other for other in self._owners.get(nodeid, {}).values() if other is not owner]

    def drop(self, nodeid: int, ident: int) -> None:
        """Unlock all that an owner has of a file: it closed a descriptor."""
        owners = self._owners.get(nodeid, {})
        if ident in owners:
            owners.pop(ident).fd.close()
            if not owners:
                del self._owners[nodeid]

    def drop_file(self, file: OpenFile) -> None:
        """Unlock what was locked through this open file alone: it is closed for good."""
        for ident, owner in list(self._owners.get(file.node.nodeid, {}).items()):
            owner.files.discard(file)
            if not owner.files:
                self.drop(file.node.nodeid, ident)

    def close(self) -> None:
        """Unlock everything."""
        for owners in self._owners.values():
            for owner in owners.values():
                owner.fd.close()
        self._owners.clear()


def _description(nodes: Nodes, file: OpenFile) -> OwnedFd:
    """Open the file anew: for reading and writing, as any lock needs, or else as far as possible."""
    name = b"%d" % file.fd.number
    with setfsuid.as_root():
        # A read-only file system, or a program that runs, has no lock for writing to give.
        for mode in (os.O_RDWR, os.O_RDONLY, os.O_WRONLY):
            with contextlib.suppress(OSError):
                return OwnedFd(os.open(name, mode | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=nodes.own))
    raise fail(errno.ENOLCK)


def get_lock(nodes: Nodes, files: Files, locks: Locks, request: Request) -> Parts:
    """Answer FUSE_GETLK."""
    fh, ident, start, end, kind, pid, _, _ = fields(request, fuse.fuse_lk_in)
    file = files.get(fh)
    owner = locks.owner(nodes, file, ident, pid)
    found = ofdlock.conflict(owner.fd.number, Range(kind, start, end))
    if found is None:
        return (fuse.fuse_file_lock.pack(0, 0, fcntl.F_UNLCK, 0),)
    # The pid of a process at home means another one at the host.
    holder = _holder(locks.others(file.node.nodeid, owner), found) if found.pid < 0 else 0
    return (fuse.fuse_file_lock.pack(found.start, found.end, found.kind, holder),)


def _holder(others: list[Owner], found: Range) -> int:
    """Return the pid at the host of who has a lock: the one whom it does not keep from locking."""
    wanted = Range(fcntl.F_WRLCK, found.start, found.end)
    for other in others:
        if ofdlock.conflict(other.fd.number, wanted) is None:
            return other.pid
    return others[0].pid if others else 0


def set_lock(nodes: Nodes, files: Files, locks: Locks, request: Request) -> Parts | After | Later:
    """Answer FUSE_SETLK, and FUSE_SETLKW: that one later, if something is in the way now."""
    fh, ident, start, end, kind, pid, flags, _ = fields(request, fuse.fuse_lk_in)
    file = files.get(fh)
    if kind not in _FLOCK_OF:
        raise fail(errno.EINVAL)
    if flags & fuse.FUSE_LK_FLOCK:
        fd, operation = file.fd, _FLOCK_OF[kind]
        now = partial(fcntl.flock, fd.number, operation | fcntl.LOCK_NB)
        wait = partial(ofdlock.wait_and_flock, operation=operation)
    else:
        _check_mode(file, kind)
        fd, wanted = locks.owner(nodes, file, ident, pid).fd, Range(kind, start, min(end, OFFSET_MAX))
        now = partial(ofdlock.lock, fd.number, wanted)
        wait = partial(ofdlock.wait_and_lock, wanted=wanted)
    try:
        now()
    except BlockingIOError:
        if request.opcode != fuse.FUSE_SETLKW:
            raise
        # A duplicate: should the program close the file meanwhile, the lock goes with our descriptor.
        again = OwnedFd(os.dup(fd.number))
        return Later(partial(_wait, file.node, again, wait), None, interruptible=True, held=again)
    return () if kind == fcntl.F_UNLCK else _refreshed(file.node, fd)


def _check_mode(file: OpenFile, kind: int) -> None:
    mode = fcntl.fcntl(file.fd.number, fcntl.F_GETFL) & os.O_ACCMODE
    refused = {os.O_RDONLY: fcntl.F_WRLCK, os.O_WRONLY: fcntl.F_RDLCK}
    if refused.get(mode) == kind:
        raise fail(errno.EBADF)


def _wait(node: Node, fd: OwnedFd, wait: Callable[[Fd], None]) -> Parts | After:
    wait(fd.number)
    return _refreshed(node, fd)


def _refreshed(node: Node, fd: OwnedFd) -> Parts | After:
    """Answer that a lock is taken, with the word to forget the content if it is another than before."""
    seen = signature(os.fstat(fd.number))
    if seen == node.seen:
        return ()
    node.seen = seen
    return After(fuse.forget_content(node.nodeid), ())
