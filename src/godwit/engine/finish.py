"""The last steps of building: descriptors, what belongs to a process, what threads do for themselves."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from godwit.engine.family import Family
from godwit.engine.stub import Stub
from godwit.errors import DestinationError, ImageError
from godwit.linux import mman, ptrace
from godwit.linux.arch import UserRegs
from godwit.procfs import stat
from godwit.procfs.status import TaskStatus
from godwit.resources import (
    attributes,
    credentials,
    fdtable,
    interrupted,
    limits,
    memory,
    signals,
    sleepnotes,
    timers,
)
from godwit.resources import thread as thread_resource
from godwit.resources.fdtable import DescriptorEntry
from godwit.resources.process import ProcessEntry, TreeEntry
from godwit.resources.thread import ThreadEntry
from godwit.tracee.task import Tracee
from godwit.types import Fd, FileId, Pid

_EVERY_FD: Final = 0xFFFFFFFF
_FLUSH_ROUNDS: Final = 8
_RLIMIT_NOFILE: Final = 7
_ASLEEP_WITHIN_S: Final = 5


def descriptors(stub: Stub, slots: Sequence[DescriptorEntry], fds: Mapping[FileId, Fd]) -> None:
    """Give the stub exactly these descriptors (and its transfer socket, out of their way).

    Args:
        stub: Whose descriptors so far are all closed.
        slots: The table to make.
        fds: Ours, of every file the table refers to.
    """
    base = max((slot.fd for slot in slots), default=-1) + 1
    base = max(base, len(fds) + 1)
    _raise_limit(stub, base + len(fds) + 2)
    transfer = stub.call("fcntl", stub.transfer_fd, 0, base)  # F_DUPFD
    batch = stub.batch()
    batch.add("close_range", 0, transfer - 1, 0)
    batch.add("close_range", transfer + 1, _EVERY_FD, 0)
    batch.run()
    stub.transfer_fd = transfer
    received = dict(zip(fds, stub.deliver(list(fds.values())), strict=True))
    aside = {file_id: transfer + 1 + index for index, file_id in enumerate(received)}
    calls: list[tuple[int, int, int]] = [(received[file_id], to, 0) for file_id, to in aside.items()]
    _dup_all(stub, calls)
    stub.call("close_range", 0, transfer - 1, 0)
    final = [(aside[slot.file_id], slot.fd, os.O_CLOEXEC if slot.close_on_exec else 0) for slot in slots]
    _dup_all(stub, final)
    stub.call("close_range", transfer + 1, _EVERY_FD, 0)


def _dup_all(stub: Stub, calls: Sequence[tuple[int, int, int]]) -> None:
    batch = stub.batch()
    for old, new, flags in calls:
        if not batch.room():
            batch.run()
            batch = stub.batch()
        batch.add("dup3", old, new, flags)
    batch.run()


def _raise_limit(stub: Stub, count: int) -> None:
    batch = stub.batch()
    old = batch.space(16)
    batch.add("prlimit64", 0, _RLIMIT_NOFILE, 0, old)
    batch.run()
    soft, hard = struct.unpack("<QQ", batch.answer(old, 16))
    if soft >= count:
        return
    if hard < count:
        raise DestinationError(
            f"pid {stub.inner} needs descriptors up to {count}, and the limit here is {hard}",
            remedy="raise the limit of open files (ulimit -n) at the destination",
        )
    stub.call("prlimit64", 0, _RLIMIT_NOFILE, struct.pack("<QQ", hard, hard), 0)


class Attachment:
    """Calls by the holders of open files. Satisfies `AttachContext`."""

    def __init__(self, family: Family, tree: TreeEntry) -> None:
        self._family = family
        self._tree = tree
        self._holders: dict[FileId, list[tuple[Pid, Fd]]] = {}
        for process in tree.processes:
            for slot in process.descriptors:
                pair = (Pid(process.identity.pid), Fd(slot.fd))
                self._holders.setdefault(slot.file_id, []).append(pair)

    def holders(self, file_id: FileId) -> Sequence[tuple[Pid, Fd]]:
        """Return who holds the file; pids of the tree's own pid namespace."""
        return self._holders.get(file_id, ())

    def call(self, inner_pid: Pid, name: str, *args: int | bytes) -> int:
        """Make one system call inside a stopped process. Raises OSError."""
        return self._family.stubs[inner_pid].call(name, *args)

    def set_owners(self) -> None:
        """Set who gets SIGIO for each file."""
        for common in self._tree.common:
            for pid, fd in self.holders(common.file_id)[:1]:
                for name, arguments in fdtable.owner_calls(common, fd):
                    self.call(pid, name, *arguments)


def process(stub: Stub, entry: ProcessEntry, open_path: Callable[[int, int], Fd]) -> None:
    """Restore what belongs to the process as a whole, but for credentials, timers and limits."""
    wanted = [open_path(entry.exe, os.O_RDONLY), open_path(entry.cwd, os.O_PATH)]
    if entry.root >= 0:
        wanted.append(open_path(entry.root, os.O_PATH))
    numbers = stub.deliver(wanted)
    batch = stub.batch()
    memory.restore_layout(entry.memory, batch, numbers[0])
    if entry.root >= 0:
        batch.add("fchdir", numbers[2])
        batch.add("chroot", b".\0")
    batch.add("fchdir", numbers[1])
    for number in numbers:
        batch.add("close", number)
    batch.add("close", stub.transfer_fd)
    batch.add("umask", entry.umask)
    batch.run()
    batch = stub.batch()
    signals.restore(entry.signals, batch)
    attributes.restore_process(entry.attributes, batch)
    batch.run()
    # While it still may raise them: the credentials come next.
    batch = stub.batch()
    limits.restore(entry.limits, batch)
    batch.run()
    limits.restore_oom(entry.limits, stub.pid)
    attributes.restore_outside(entry.attributes, stub.pid)


def prolonged(entry: ProcessEntry, jump_ns: int) -> ProcessEntry:
    """Put off the end of every sleep: a sleep may last longer than asked for, and never shorter."""
    threads = tuple(
        replace(own, sleep=replace(own.sleep, deadline_ns=own.sleep.deadline_ns + jump_ns))
        if own.sleep is not None and own.sleep.deadline_ns is not None
        else own
        for own in entry.threads
    )
    return replace(entry, threads=threads)


def thread(stub: Stub, entry: ProcessEntry, own: ThreadEntry, current: TaskStatus) -> None:
    """Restore what a thread must do for itself; the leader also does what is left of the process.

    `current` is how the threads stand so far: only what differs is changed.
    """
    task = stub.threads.get(own.tid)
    if task is None:
        raise ImageError(f"thread {own.tid} of pid {stub.inner} is not in its list of threads")
    leader = task is stub.task
    batch = stub.batch(task)
    thread_resource.restore_self(own, batch)
    attributes.restore_thread(entry.attributes, batch)
    credentials.restore(entry.credentials, batch, current=current, first=leader)
    thread_resource.restore_parent_death_signal(own, batch)
    batch.run()
    if leader:
        _flush_signals(stub, task)
        batch = stub.batch(task)
        timers.restore(entry.timers, batch)
        signals.queue_for_process(entry.signals.pending, batch, stub.inner)
        signals.queue_for_thread(own.pending, batch, stub.inner, own.tid)
        batch.run()
    elif own.pending:
        batch = stub.batch(task)
        signals.queue_for_thread(own.pending, batch, stub.inner, own.tid)
        batch.run()


def sleeps(stub: Stub, entry: ProcessEntry, clock_shift_ns: int) -> None:
    """Begin every interrupted sleep again. The pages must be there: a futex is looked at."""
    for own in entry.threads:
        if own.sleep is not None:
            _sleep_again(stub, stub.threads[own.tid], own, clock_shift_ns)


def _flush_signals(stub: Stub, task: Tracee) -> None:
    """Drop what the building itself has sent: SIGCHLD of placeholders and zombies."""
    while True:
        batch = stub.batch(task)
        every, now = batch.data(b"\xff" * 8), batch.data(bytes(16))
        for _ in range(_FLUSH_ROUNDS):
            batch.add("rt_sigtimedwait", every, 0, now, 8, may_fail=True)
        if batch.run()[-1] < 0:
            return


def _sleep_again(stub: Stub, task: Tracee, own: ThreadEntry, clock_shift_ns: int) -> None:
    """Begin an interrupted sleep with what is left of it, and interrupt it again.

    The kernel then holds the time of expiry for this thread as it did at the source, and the
    thread's registers can be the old ones to the letter.
    """
    assert own.sleep is not None
    arguments, timespec = interrupted.rearmed(own.sleep, time.monotonic_ns() + clock_shift_ns)
    batch = stub.batch(task)
    if timespec:
        address = batch.data(timespec)
        arguments = tuple(address if value == -1 else value for value in arguments)
    batch.add(own.sleep.call, *arguments, may_fail=True)
    batch.enter()
    ptrace.resume(task.tid)
    if not _fell_asleep(stub, task, own.sleep.call):
        registers = UserRegs.from_buffer_copy(own.registers)
        registers.finish_call(batch.collect()[0])
        stub.ended_sleeps[own.tid] = bytes(registers)


def _fell_asleep(stub: Stub, task: Tracee, call: str) -> bool:
    """Return True once the thread was interrupted in its sleep, False if the call ended by itself."""
    deadline = time.monotonic() + _ASLEEP_WITHIN_S
    while time.monotonic() < deadline:
        if ptrace.poll_stop(task.tid) is not None:
            return False
        if stat.read_place(stub.pid, task.tid)[0] == "S":
            ptrace.interrupt(task.tid)
            # The sleep may end by itself before the interrupt comes: then the trap is first.
            if ptrace.wait_stop(task.tid).event != ptrace.PTRACE_EVENT_STOP:
                return False
            if ptrace.get_registers(task.tid).result == interrupted.ERESTART_RESTARTBLOCK:
                return True
            ptrace.resume(task.tid)
        os.sched_yield()
    raise DestinationError(f"thread {task.tid} does not fall asleep in {call} again")


def notes(stub: Stub, entry: ProcessEntry) -> None:
    """Leave notes about the sleeps that go on, for the next move."""
    found: list[sleepnotes.Note] = []
    for own in entry.threads:
        if own.sleep is None or own.sleep.deadline_ns is None or own.tid in stub.ended_sleeps:
            continue
        regs = UserRegs.from_buffer_copy(own.registers)
        place = (regs.instruction_pointer, regs.stack_pointer)
        found.append(sleepnotes.Note(own.tid, own.sleep.call, *place, own.sleep.deadline_ns))
    content = sleepnotes.pack(found)
    if not found or len(content) > sleepnotes.LIMIT_BYTES:
        return
    flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
    try:
        at = stub.call("mmap", 0, len(content), mman.PROT_READ, flags, -1, 0)
    except OSError:
        return  # Its own limits leave no room: a later move then knows less about its sleeps.
    os.pwrite(stub.workshop.memory.number, content, at)
    batch = stub.batch()
    name = batch.data(sleepnotes.VMA_NAME + b"\0")
    arguments = (mman.PR_SET_VMA, mman.PR_SET_VMA_ANON_NAME, at, len(content), name)
    batch.add("prctl", *arguments, may_fail=True)
    batch.run()


def registers(stub: Stub, entry: ProcessEntry) -> None:
    """Take the workshop away and give every thread its registers. Nothing can be injected any more."""
    stub.workshop.unmap(stub.task)
    for own in entry.threads:
        # Until now it shared our CPU, and whatever it is to be has not slowed it down.
        thread_resource.restore_scheduling(own, stub.threads[own.tid].tid)
        wanted = stub.ended_sleeps.get(own.tid, own.registers)
        thread_resource.restore_registers(own, stub.threads[own.tid], wanted)
