"""Open files held by a child, as the engine would hand them to a kind, and a place to restore them.

The child does nothing. What it holds is the unmoved twin: after a restore both are asked the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from godwit.linux import abi, kcmp
from godwit.procfs import fdinfo
from godwit.resources.base import FileKind, OpenFile
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.roots import OURS
from godwit.types import Fd, FileId, OwnedFd, Pid


def _open_file(file_id: int, pid: Pid, fds: Sequence[Fd]) -> OpenFile:
    path = f"/proc/{pid}/fd/{fds[0]}"
    status = os.stat(path)
    return OpenFile(
        file_id=FileId(file_id),
        holders=tuple((pid, fd) for fd in fds),
        link=os.readlink(path),
        info=fdinfo.read(pid, fds[0]),
        mode=status.st_mode,
        device=status.st_dev,
        rdevice=status.st_rdev,
        inode=status.st_ino,
        where=f"pid {pid} fd {fds[0]}",
    )


class Child:
    """A process that holds descriptors; a tree of one."""

    def __init__(self, pid: Pid, fds: Sequence[Fd]) -> None:
        self.pid = pid
        groups: list[list[Fd]] = []
        for fd in sorted(fds):
            for group in groups:
                if kcmp.same_file(pid, fd, pid, group[0]):
                    group.append(fd)
                    break
            else:
                groups.append([fd])
        self.files: Sequence[OpenFile] = [
            _open_file(number, pid, group) for number, group in enumerate(groups, 1)
        ]
        self.pids = frozenset([pid])

    def file_at(self, pid: Pid, fd: Fd) -> OpenFile | None:
        return next((file for file in self.files if (pid, fd) in file.holders), None)

    def outside_holders(self, inode_link: str) -> Sequence[tuple[Pid, Fd]]:
        found: list[tuple[Pid, Fd]] = []
        for path in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if os.readlink(path) == inode_link and int(path.parts[2]) not in self.pids:
                    found.append((Pid(int(path.parts[2])), Fd(int(path.name))))
        return found

    def memory_object_id(self, device: int, inode: int) -> int:  # noqa: ARG002
        return inode

    @property
    def closes_connections(self) -> bool:
        """No test of a kind lets connections break but by the whole program."""
        return False

    def has_object(self, device: int, inode: int) -> bool:
        """Only memfds are objects here, and they are asked for by number."""
        del device, inode
        return False

    def path_file(self, proc_path: str, path: bytes, *, content: bool) -> PathFileEntry:
        raise NotImplementedError

    def at(self, fd: int) -> OpenFile:
        found = self.file_at(self.pid, Fd(fd))
        assert found is not None
        return found

    def twin(self, fd: int) -> OwnedFd:
        """Take the unmoved twin of what the child has under a number."""
        return self.at(fd).duplicate()


@contextlib.contextmanager
def held(*fds: int, close: bool = True) -> Iterator[Child]:
    """Fork a child that holds exactly these descriptors; ours are closed unless the test shares them."""
    pid = os.fork()
    if pid == 0:
        try:
            limit = os.sysconf("SC_OPEN_MAX")
            edges = [-1, *sorted(set(fds)), limit]
            for low, high in itertools.pairwise(edges):
                os.closerange(low + 1, high)
            signal.pause()
        finally:
            os._exit(0)
    try:
        if close:
            for fd in set(fds):
                os.close(fd)
        _wait_until_paused(pid, len(set(fds)))
        yield Child(Pid(pid), [Fd(fd) for fd in set(fds)])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait_until_paused(pid: int, count: int) -> None:
    with OwnedFd(os.pidfd_open(pid)) as process:
        poll = select.poll()
        poll.register(process.number, select.POLLIN)
        for _ in range(10_000):
            if len(os.listdir(f"/proc/{pid}/fd")) == count:
                return
            assert not poll.poll(1), "the child ended"
    raise AssertionError("the child did not come to rest")


class Builder:
    """What a restore may ask for; holds what was restored and closes it."""

    inner_pid = Pid(1)
    root = OURS

    def __init__(self, objects: Mapping[int, OwnedFd] | None = None) -> None:
        self.files: dict[FileId, OwnedFd] = {}
        self._objects = dict(objects or {})

    def memory_object(self, object_id: int) -> OwnedFd:
        return self._objects[object_id]

    def close(self) -> None:
        for fd in (*self.files.values(), *self._objects.values()):
            fd.close()


def over_the_wire(kind: FileKind, entry: Any) -> Any:  # noqa: ANN401  # each kind has its own entries
    """Send an entry through the codec, as every move does."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=kind.entry)


@contextlib.contextmanager
def restored(kind: FileKind, child: Child, objects: Mapping[int, OwnedFd] | None = None) -> Iterator[Builder]:
    """Collect all the child's files of a kind and restore them here."""
    files = [file for file in child.files if kind.claims(file)]
    assert files, [file.link for file in child.files]
    builder = Builder(objects)
    try:
        for entry in kind.collect(files, child):
            wired = over_the_wire(kind, entry)
            made = kind.restore(wired, builder)
            assert set(made) == set(wired.file_ids)
            builder.files.update(made)
        yield builder
    finally:
        builder.close()


def moved(child: Child, builder: Builder, fd: int) -> OwnedFd:
    """Return the restored counterpart of what the child has under a number."""
    return builder.files[child.at(fd).file_id]


def info_of(fd: OwnedFd) -> fdinfo.FdInfo:
    return fdinfo.read(Pid(os.getpid()), fd.number)


def flags_shown(fd: OwnedFd) -> int:
    return info_of(fd).flags & ~os.O_CLOEXEC


class Puppet:
    """A process that makes system calls on demand: stands for a stopped task of the tree."""

    def __init__(self, pid: Pid, line: socket.socket) -> None:
        self.pid = pid
        self._line = line
        self.table: dict[FileId, list[tuple[Pid, Fd]]] = {}

    def give(self, file_id: FileId, fd: OwnedFd, *numbers: int) -> None:
        """Give it a file under each number."""
        for number in numbers:
            socket.send_fds(self._line, [json.dumps(["take", number]).encode()], [fd.number])
            self._answer()
            self.table.setdefault(file_id, []).append((self.pid, Fd(number)))

    def holders(self, file_id: FileId) -> Sequence[tuple[Pid, Fd]]:
        return self.table[file_id]

    def call(self, inner_pid: Pid, name: str, *args: int | bytes) -> int:
        assert inner_pid == self.pid
        plain = [list(arg) if isinstance(arg, bytes) else arg for arg in args]
        self._line.send(json.dumps([name, *plain]).encode())
        return self._answer()

    def _answer(self) -> int:
        answer: int = json.loads(self._line.recv(1 << 16))
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return answer


def _serve(line: socket.socket) -> None:
    while True:
        data, fds, _, _ = socket.recv_fds(line, 1 << 16, 1)
        if not data:
            return
        name, *args = json.loads(data)
        try:
            if name == "take":
                result = os.dup2(fds[0], args[0], inheritable=False)
                os.close(fds[0])
            else:
                result = abi.syscall(name, *(bytes(arg) if isinstance(arg, list) else arg for arg in args))
        except OSError as error:
            result = -(error.errno or 1)
        line.send(json.dumps(result).encode())


@contextlib.contextmanager
def puppet() -> Iterator[Puppet]:
    """Fork one, with nothing open but its line to us (descriptor 200)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(theirs.fileno(), 200)
            os.closerange(0, 200)
            os.closerange(201, os.sysconf("SC_OPEN_MAX"))
            _serve(socket.socket(fileno=200))
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        try:
            yield Puppet(Pid(pid), ours)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def readiness(fd: OwnedFd) -> int:
    """Return all that poll(2) tells of a file."""
    poll = select.poll()
    poll.register(fd.number, 0x7FFF)
    return next((events for _, events in poll.poll(0)), 0)


def same(question: Callable[[OwnedFd], object], mine: OwnedFd, twin: OwnedFd) -> None:
    """Ask the moved file and its unmoved twin the same."""
    assert question(mine) == question(twin)


def is_socket(file: OpenFile) -> bool:
    return stat.S_ISSOCK(file.mode)
