"""Stubs: processes made empty at the destination, to be filled.

The first one, the seed, is forked from Python and executes a one-page program of ours; all others
are cloned from it by injected clone3(2), at 70 µs each. None of them ever runs an instruction but
those that we inject.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from godwit.errors import BusyError, DestinationError, InternalError
from godwit.linux import clone, elf, mount, ns, ptrace
from godwit.linux.arch import pod_init
from godwit.linux.clone import CloneArgs
from godwit.linux.mem import open_memory
from godwit.tracee.calls import Batch, Workshop, map_workshop
from godwit.tracee.task import Tracee
from godwit.types import Fd, OwnedFd, Pid, RemoteAddr, Tid

STATUS_FD: Final = 3
TRANSFER_FD: Final = 4
_PROGRAM_FD: Final = 5
_FDS_PER_MESSAGE: Final = 250  # SCM_MAX_FD is 253
_THREAD_FLAGS: Final = (
    clone.CLONE_VM
    | clone.CLONE_FS
    | clone.CLONE_FILES
    | clone.CLONE_SIGHAND
    | clone.CLONE_THREAD
    | clone.CLONE_SYSVSEM
)
_OPTIONS: Final = (
    ptrace.PTRACE_O_TRACEEXEC
    | ptrace.PTRACE_O_TRACEFORK
    | ptrace.PTRACE_O_TRACEVFORK
    | ptrace.PTRACE_O_TRACECLONE
    | ptrace.PTRACE_O_EXITKILL
)
_MSGHDR: Final = struct.Struct("<QIxxxxQQQQixxxx")
_CMSG_HEADER_BYTES: Final = 16


@dataclass(slots=True)
class Transfer:
    """The socket pair by which descriptors reach the stubs; every stub has the far end open."""

    near: socket.socket
    far: socket.socket

    @classmethod
    def open(cls) -> Transfer:
        """Make the pair."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(near, far)

    def close(self) -> None:
        """Close our ends."""
        self.near.close()
        self.far.close()


@dataclass(slots=True)
class Stub:
    """A stopped process of ours. `inner` is its pid in the tree's own namespace."""

    inner: int
    task: Tracee
    workshop: Workshop
    transfer: Transfer
    transfer_fd: int = TRANSFER_FD
    threads: dict[int, Tracee] = field(default_factory=dict[int, Tracee])  # by inner tid, leader included
    ended_sleeps: dict[int, bytes] = field(default_factory=dict[int, bytes])  # registers, by inner tid

    @property
    def pid(self) -> Pid:
        """Its pid in our namespace."""
        return self.task.pid

    def batch(self, task: Tracee | None = None) -> Batch:
        """Begin a batch of calls, made by the leader or by `task`."""
        return self.workshop.batch(task or self.task)

    def call(self, name: str, *args: int | bytes) -> int:
        """Make one call inside the stub."""
        return self.workshop.call(self.task, name, *args)

    def deliver(self, fds: Sequence[Fd]) -> list[int]:
        """Duplicate descriptors of ours into the stub; return their numbers there, in order.

        They are the lowest free numbers, not close-on-exec.
        """
        numbers: list[int] = []
        for first in range(0, len(fds), _FDS_PER_MESSAGE):
            part = list(fds[first : first + _FDS_PER_MESSAGE])
            rights = array.array("i", part)
            self.transfer.near.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            numbers += self._receive(len(part))
        return numbers

    def _receive(self, count: int) -> list[int]:
        batch = self.batch()
        control_bytes = _CMSG_HEADER_BYTES + (count * 4 + 7) // 8 * 8
        control = batch.space(control_bytes)
        byte = batch.space(1)
        iov = batch.data(struct.pack("<QQ", byte, 1))
        message = batch.data(_MSGHDR.pack(0, 0, iov, 1, control, control_bytes, 0))
        batch.add("recvmsg", self.transfer_fd, message, socket.MSG_DONTWAIT)
        batch.run()
        raw = batch.answer(control, control_bytes)
        length = struct.unpack_from("<Q", raw)[0]
        if length != _CMSG_HEADER_BYTES + count * 4:
            raise DestinationError(
                f"the new process {self.inner} took only part of {count} descriptors",
                remedy="raise the limit of open files (ulimit -n) at the destination",
            )
        return list(struct.unpack_from(f"<{count}i", raw, _CMSG_HEADER_BYTES))

    def move_workshop(self, address: int) -> None:
        """Make calls from another place from now on: its old one is needed."""
        before = self.workshop
        self.workshop = map_workshop(self.task, address)
        before.unmap(self.task)
        before.close()

    def close(self) -> None:
        """Close our descriptors for it."""
        self.workshop.close()


def make_seed(
    transfer: Transfer,
    *,
    pids: Sequence[Pid],
    flags: int,
    status_fd: Fd | None,
    new_session: bool,
    root: Path | None = None,
) -> Tracee:
    """Fork the first stub; return it stopped, saved, at the start of its one-page program.

    Args:
        transfer: Its far end becomes the stub's TRANSFER_FD.
        pids: As `fork_with_ids` takes them.
        flags: CLONE_NEW* of the seed.
        status_fd: Becomes the stub's STATUS_FD; None leaves that number closed.
        new_session: The stub leads a session of its own.
        root: A mount of ours that becomes the stub's root, in a mount namespace of its own.

    Raises:
        BusyError: A pid is taken.
        DestinationError: The kernel refuses.
    """
    with OwnedFd(os.memfd_create("godwit", os.MFD_CLOEXEC)) as program:
        os.write(program.number, elf.static_executable(pod_init()))
        ready_read, ready_write = os.pipe()
        try:
            try:
                pid = clone.fork_with_ids(flags, pids)
            except FileExistsError as error:
                raise BusyError(f"pid {pids[0]} is taken", remedy="restore with --pod") from error
            except OSError as error:
                raise DestinationError(
                    f"cannot make a process with pid {list(pids)}: {error.strerror}",
                    remedy="run as root, or restore with --pod",
                ) from error
            if pid == 0:
                os.close(ready_write)
                fds = (ready_read, program.number, transfer.far.fileno())
                _become_seed(*fds, status_fd, new_session, root)
            return _seize_seed(pid, ready_write)
        finally:
            os.close(ready_read)
            os.close(ready_write)


def _become_seed(
    ready: int, program: int, transfer: int, status_fd: int | None, new_session: bool, root: Path | None
) -> NoReturn:
    try:
        os.read(ready, 1)
        if new_session:
            os.setsid()
        if root is not None:
            ns.unshare(ns.CLONE_NEWNS)
            mount.pivot_to(root)
        # Out of the way of the numbers to be used first.
        sources = [_duplicate_high(fd) for fd in (program, transfer)]
        status = _duplicate_high(status_fd) if status_fd is not None else None
        os.dup2(sources[1], TRANSFER_FD)
        os.dup2(sources[0], _PROGRAM_FD, inheritable=False)
        if status is not None:
            os.dup2(status, STATUS_FD)
        else:
            with contextlib.suppress(OSError):
                os.close(STATUS_FD)
        os.closerange(0, STATUS_FD)
        os.closerange(_PROGRAM_FD + 1, os.sysconf("SC_OPEN_MAX"))
        os.execve(_PROGRAM_FD, ["godwit-pod"], {})
    finally:
        os._exit(127)


def _duplicate_high(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD, 64)


def _seize_seed(pid: Pid, ready: int) -> Tracee:
    task = Tracee.seize(pid, Tid(pid), _OPTIONS)
    os.write(ready, b"x")
    while True:
        stop = ptrace.wait_stop(task.tid)
        if stop.exited:
            raise InternalError(f"the first stub ended with status {stop.status:#x}")
        if stop.event == ptrace.PTRACE_EVENT_EXEC:
            break
        ptrace.resume(task.tid, 0 if stop.event else stop.signal)
    # Inside execve(2) still: its result would overwrite a register of ours.
    ptrace.single_step(task.tid)
    ptrace.wait_stop(task.tid)
    task.save()
    return task


def seed_stub(inner: int, task: Tracee, transfer: Transfer, workshop_at: int) -> Stub:
    """Give the seed its workshop, at an address free in every process to be built."""
    workshop = map_workshop(task, workshop_at)
    return Stub(inner, task, workshop, transfer, threads={inner: task})


def _clone_args(batch: Batch, inner: int, flags: int, exit_signal: int) -> RemoteAddr:
    set_tid = batch.data(struct.pack("<i", inner))
    arguments = CloneArgs(flags=flags, exit_signal=exit_signal, set_tid=set_tid, set_tid_size=1)
    return batch.data(bytes(arguments))


def _clone_many(parent: Stub, inners: Sequence[int], flags: int, exit_signal: int) -> list[Tid]:
    born: list[Tid] = []
    for first in range(0, len(inners), 200):
        part = inners[first : first + 200]
        batch = parent.batch()
        for inner in part:
            batch.add("clone3", _clone_args(batch, inner, flags, exit_signal), clone.CLONE_ARGS_BYTES)
        try:
            batch.run()
        except FileExistsError as error:
            raise BusyError(f"a pid among {list(part)} is taken", remedy="restore with --pod") from error
        finally:
            born += batch.born
    return born


def _adopt(pid: Pid, tid: Tid) -> Tracee:
    """Take over a task that the kernel attached to us at its birth."""
    task = Tracee(pid, tid)
    task.wait_until_stopped()
    task.save()
    return task


def clone_process(
    parent: Stub, inner: int, *, exit_signal: int = signal.SIGCHLD, sibling: bool = False
) -> Stub:
    """Clone a stub from another: its child, or (`sibling`) a child of its parent."""
    flags = clone.CLONE_PARENT if sibling else 0
    (tid,) = _clone_many(parent, [inner], flags, 0 if sibling else exit_signal)
    task = _adopt(Pid(tid), tid)
    workshop = Workshop(parent.workshop.address, open_memory(task.pid), parent.workshop.gadgets)
    return Stub(inner, task, workshop, parent.transfer, parent.transfer_fd, threads={inner: task})


def clone_threads(stub: Stub, inners: Sequence[int]) -> None:
    """Give a stub its threads besides the leader."""
    tids = _clone_many(stub, inners, _THREAD_FLAGS, 0)
    for inner, tid in zip(inners, tids, strict=True):
        stub.threads[inner] = _adopt(stub.pid, tid)


def kill(task: Tracee) -> None:
    """Kill a process by one of its threads and take the thread's death note, as its tracer must.

    Of a process with several threads, the leader's turn comes last.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(task.pid, signal.SIGKILL)
    task.wait_until_gone()
