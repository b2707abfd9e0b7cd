"""Home's end of the files: a server of FUSE requests."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from godwit.linux import fuse, setfsuid
from godwit.residual.homefiles import (
    attributes,
    content,
    directories,
    locks,
    names,
    opening,
    xattrs,
)
from godwit.residual.homefiles.credentials import Credentials
from godwit.residual.homefiles.export import Export
from godwit.residual.homefiles.files import Files
from godwit.residual.homefiles.messages import (
    After,
    Later,
    Parts,
    ProtocolError,
    Request,
    fail,
    fields,
    parse,
)
from godwit.residual.homefiles.nodes import Device, Nodes
from godwit.residual.homefiles.special import Special
from godwit.residual.homefiles.watch import Watch
from godwit.residual.homefiles.workers import Workers
from godwit.types import OwnedFd

Operation = Callable[[Export, Request], Parts | After | Later]

_LAST_ERRNO: Final = 511
_MAX_BACKGROUND: Final = 64
_CONGESTION: Final = 48
_WANTED: Final = (
    fuse.FUSE_ASYNC_READ
    | fuse.FUSE_POSIX_LOCKS
    | fuse.FUSE_ATOMIC_O_TRUNC
    | fuse.FUSE_BIG_WRITES
    | fuse.FUSE_DONT_MASK
    | fuse.FUSE_FLOCK_LOCKS
    | fuse.FUSE_DO_READDIRPLUS
    | fuse.FUSE_READDIRPLUS_AUTO
    | fuse.FUSE_ASYNC_DIO
    | fuse.FUSE_PARALLEL_DIROPS
    | fuse.FUSE_POSIX_ACL
    | fuse.FUSE_MAX_PAGES
    | fuse.FUSE_CACHE_SYMLINKS
    | fuse.FUSE_HANDLE_KILLPRIV_V2
    | fuse.FUSE_SETXATTR_EXT
    | fuse.FUSE_INIT_EXT
)


def _add_nothing(device: Device) -> None:
    pass


def _no_terminal(export: Export, request: Request) -> Parts:  # noqa: ARG001  # an `Operation`
    raise fail(errno.ENOTTY)


def _nothing(export: Export, request: Request) -> Parts:  # noqa: ARG001  # an `Operation`
    return ()


def _get_lock(export: Export, request: Request) -> Parts:
    return locks.get_lock(export.nodes, export.files, export.locks, request)


def _set_lock(export: Export, request: Request) -> Parts | After | Later:
    return locks.set_lock(export.nodes, export.files, export.locks, request)


def _init(export: Export, request: Request) -> Parts:
    """Answer FUSE_INIT: agree with the host's kernel on what is spoken."""
    major, minor, readahead, offered, _ = fields(request, fuse.fuse_init_in)
    if major != fuse.FUSE_KERNEL_VERSION or minor < fuse.FUSE_OLDEST_MINOR_VERSION:
        raise fail(errno.EPROTO)
    wanted = _WANTED if export.nodes.root.device.is_watched else _WANTED | fuse.FUSE_AUTO_INVAL_DATA
    reply = fuse.fuse_init_out.pack(
        *(major, min(minor, fuse.FUSE_KERNEL_MINOR_VERSION), readahead, wanted & offered),
        *(_MAX_BACKGROUND, _CONGESTION, fuse.MAX_WRITE_BYTES, 1, fuse.PAGES_OF_A_MESSAGE, 0, 0),
    )
    return (reply,)


_AS_THE_CALLER: Final[dict[int, Operation]] = {
    fuse.FUSE_LOOKUP: names.lookup,
    fuse.FUSE_SETATTR: attributes.setattr_,
    fuse.FUSE_SYMLINK: names.symlink,
    fuse.FUSE_MKNOD: names.mknod,
    fuse.FUSE_MKDIR: names.mkdir,
    fuse.FUSE_UNLINK: names.unlink,
    fuse.FUSE_RMDIR: names.rmdir,
    fuse.FUSE_RENAME: names.rename,
    fuse.FUSE_RENAME2: names.rename2,
    fuse.FUSE_LINK: names.link,
    fuse.FUSE_OPEN: opening.open_,
    fuse.FUSE_OPENDIR: opening.opendir,
    fuse.FUSE_CREATE: opening.create,
    fuse.FUSE_TMPFILE: opening.tmpfile,
    fuse.FUSE_READDIR: directories.readdir,
    fuse.FUSE_READDIRPLUS: directories.readdir,
    fuse.FUSE_ACCESS: attributes.access,
    fuse.FUSE_GETXATTR: xattrs.getxattr,
    fuse.FUSE_LISTXATTR: xattrs.listxattr,
    fuse.FUSE_SETXATTR: xattrs.setxattr,
    fuse.FUSE_REMOVEXATTR: xattrs.removexattr,
}
# Allowed to whoever holds the node or the open file; some of these the kernel sends as nobody.
_AS_ANYBODY: Final[dict[int, Operation]] = {
    fuse.FUSE_INIT: _init,
    fuse.FUSE_GETATTR: attributes.getattr_,
    fuse.FUSE_READLINK: names.readlink,
    fuse.FUSE_STATFS: attributes.statfs_,
    fuse.FUSE_READ: content.read,
    fuse.FUSE_WRITE: content.write,
    fuse.FUSE_FLUSH: opening.flush,
    fuse.FUSE_FSYNC: content.fsync,
    fuse.FUSE_FSYNCDIR: content.fsync,
    fuse.FUSE_FALLOCATE: content.fallocate,
    fuse.FUSE_LSEEK: content.lseek,
    fuse.FUSE_COPY_FILE_RANGE: content.copy_file_range,
    fuse.FUSE_RELEASE: opening.release,
    fuse.FUSE_RELEASEDIR: opening.release,
    fuse.FUSE_GETLK: _get_lock,
    fuse.FUSE_SETLK: _set_lock,
    fuse.FUSE_SETLKW: _set_lock,
    fuse.FUSE_IOCTL: _no_terminal,
    fuse.FUSE_DESTROY: _nothing,
}
_WITHOUT_ANSWER: Final = frozenset(
    {fuse.FUSE_FORGET, fuse.FUSE_BATCH_FORGET, fuse.FUSE_INTERRUPT, fuse.FUSE_NOTIFY_REPLY}
)


class HomeFiles:
    """Serves one directory of home to one host, for one job.

    Args:
        root: The directory that the host's mount shows.
        reply: Takes the parts of one message to the host. It is called from several threads, and may not
            keep the parts.
        allowed: As whom the job may act.
        ttl_ns: How long the host may believe what it was told.
        watched_ttl_ns: The same where home tells of changes; 0: it does not. Only root can.
        max_descriptors: How many files are held open for being known to the host, beyond open files.
    """

    def __init__(
        self,
        root: Path | str,
        reply: Callable[[Sequence[bytes]], None],
        *,
        allowed: Credentials,
        ttl_ns: int = 1_000_000_000,
        watched_ttl_ns: int = 0,
        max_descriptors: int = 4096,
    ) -> None:
        self._reply = reply
        self._watch = Watch(reply) if watched_ttl_ns else None
        add_device = self._watch.add_device if self._watch else _add_nothing
        with setfsuid.as_root(), OwnedFd(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            nodes = Nodes(fd.release(), max_descriptors, add_device)
        self._export = Export(
            nodes=nodes,
            files=Files(),
            locks=locks.Locks(),
            special=Special(),
            credentials=allowed,
            ttl_ns=ttl_ns,
            watched_ttl_ns=watched_ttl_ns,
            notify=self._reply,
        )
        self._workers = Workers(self._answer)
        if self._watch is not None:
            self._watch.start(nodes)

    def handle(self, message: bytes | memoryview) -> None:
        """Serve one message of the host's kernel; the answer goes to `reply`, now or later.

        One thread calls this, and it acts on files as the last caller it served: let it do nothing else.

        Raises:
            ProtocolError: The message is none. The link should be given up.
        """
        request = parse(message)
        if request.opcode in _WITHOUT_ANSWER:
            self._take(request)
        else:
            self._answer(request.unique, partial(self._serve, request))

    def register(self, fd: OwnedFd) -> bytes:
        """Take over an open file and return the path, below the mount at the host, that opens it."""
        return self._export.special.register(fd)

    def close(self) -> None:
        """Let all files and locks go, and end the threads. Call it from the thread that called `handle`."""
        if self._watch is not None:
            self._watch.close()
        self._workers.close()
        self._export.locks.close()
        self._export.files.close()
        self._export.special.close()
        self._export.nodes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self, request: Request) -> Parts | After | None:
        operation = _AS_ANYBODY.get(request.opcode)
        if operation is None:
            operation = _AS_THE_CALLER.get(request.opcode)
            if operation is None:
                raise fail(errno.ENOSYS)
            setfsuid.become(*self._export.identity(request))
        outcome = operation(self._export, request)
        if isinstance(outcome, Later):
            self._workers.submit(request.unique, outcome)
            return None
        return outcome

    def _answer(self, unique: int, work: Callable[[], Parts | After | None]) -> None:
        """Send what the work returns or raises; None is sent by somebody else, later."""
        if self._watch is not None:
            self._watch.add_thread(threading.get_native_id())
        try:
            outcome = work()
        except OSError as error:
            number = error.errno or 0
            self._reply(fuse.error_reply(unique, number if 0 < number <= _LAST_ERRNO else errno.EIO))
        except (ValueError, OverflowError, struct.error):
            # A number that no kernel sends: too large for the call it was meant for.
            self._reply(fuse.error_reply(unique, errno.EINVAL))
        else:
            if isinstance(outcome, After):
                self._reply(outcome.notification + fuse.reply(unique, outcome.answer))
            elif outcome is not None:
                self._reply(fuse.reply(unique, outcome))

    def _take(self, request: Request) -> None:
        """Serve a message that has no answer. Raises ProtocolError."""
        if request.opcode == fuse.FUSE_FORGET:
            (lookups,) = _numbers(request, fuse.fuse_forget_in)
            self._export.nodes.forget(request.nodeid, lookups)
        elif request.opcode == fuse.FUSE_BATCH_FORGET:
            count, _ = _numbers(request, fuse.fuse_batch_forget_in)
            each = request.body[fuse.fuse_batch_forget_in.size :]
            if len(each) != count * fuse.fuse_forget_one.size:
                raise ProtocolError(f"{count} nodes forgotten in {len(each)} bytes")
            for nodeid, lookups in fuse.fuse_forget_one.iter_unpack(each):
                self._export.nodes.forget(nodeid, lookups)
        elif request.opcode == fuse.FUSE_INTERRUPT:
            (unique,) = _numbers(request, fuse.fuse_interrupt_in)
            self._workers.interrupt(unique)


def _numbers(request: Request, layout: struct.Struct) -> tuple[int, ...]:
    """Return the numbers of a message that cannot be answered. Raises ProtocolError: there are fewer."""
    try:
        return fields(request, layout)
    except OSError as error:
        raise ProtocolError(f"request {request.opcode} with {len(request.body)} bytes") from error
