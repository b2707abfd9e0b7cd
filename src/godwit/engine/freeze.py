"""Stopping a whole process tree, and letting it go.

Every thread is seized and interrupted before any is waited for: 50 threads stop in half a
millisecond. New threads and children may appear meanwhile, so the list is taken again until it is
stable. While frozen, nothing of the tree runs but what we inject.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from godwit.errors import BusyError, NoProcessError, UnsupportedStateError
from godwit.linux import mem, ptrace
from godwit.linux.pause import pause
from godwit.procfs import stat, tasks
from godwit.resources import interrupted
from godwit.resources.thread import Repose, SchedulerClocks, abort_critical_section, observe
from godwit.tracee import calls
from godwit.tracee.task import Tracee
from godwit.types import OwnedFd, Pid, Tid

_STOPPED_WITHIN_S: Final = 0.25
_LET_GO_WITHIN_S: Final = 5.0
_REPORTED_WITHIN_S: Final = 0.02
_LET_GO_AGAIN_S: Final = 0.013
_RANDOM_MOST_BYTES: Final = 1 << 20  # to be made while everything stands still


@dataclass(slots=True)
class FrozenTree:
    """A tree whose threads are all stopped and saved."""

    root: Pid
    alone: bool = False  # only the root, without its descendants
    # Leader first in each.
    tracees: dict[Pid, dict[Tid, Tracee]] = field(default_factory=dict[Pid, dict[Tid, Tracee]])
    schedulers: SchedulerClocks = field(default_factory=SchedulerClocks)
    reposes: dict[Tid, Repose] = field(default_factory=dict[Tid, Repose])

    def threads(self) -> Iterator[Tracee]:
        """Yield every thread."""
        for group in self.tracees.values():
            yield from group.values()

    def leader(self, pid: Pid) -> Tracee:
        """Return the thread that calls of a process are injected into."""
        group = self.tracees[pid]
        return group.get(Tid(pid)) or next(iter(group.values()))

    def park(self) -> None:
        """See to it that nothing runs again even if we die: see `Tracee.park`."""
        for task in self.threads():
            task.park()

    def unpark(self) -> None:
        """Take `park` back."""
        for group in self.tracees.values():
            for task in group.values():
                task.unpark([other for other in group.values() if other is not task])

    def kill(self) -> None:
        """End every process of the tree and take the death notes, threads before their leader.

        Robust futexes are not marked as left by a dead owner: their owner lives on elsewhere.
        """
        for task in self.threads():
            with contextlib.suppress(OSError, NoProcessError):
                _forget_robust_list(task)
        for pid in self.tracees:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for group in self.tracees.values():
            for task in sorted(group.values(), key=lambda task: task.tid == Tid(task.pid)):
                task.wait_until_gone()
        self.tracees.clear()

    def thaw(self) -> None:
        """Put everything back and let every thread go."""
        for task in self.threads():
            task.detach()
        self.tracees.clear()


def _gone(root: Pid) -> NoProcessError | BusyError:
    """Say why nothing of a process could be stopped: a thread that executes a program takes its pid over."""
    pause(_LET_GO_AGAIN_S)
    with contextlib.suppress(ProcessLookupError):
        if stat.read(root).state not in "ZX":
            return BusyError(f"process {root} executes a program just now", remedy="try again in a moment")
    return NoProcessError(f"process {root} ended before it could be stopped")


def _forget_robust_list(task: Tracee) -> None:
    head, length = ptrace.get_robust_list(task.tid)
    if not head:
        return
    with mem.open_memory(task.pid) as memory:
        first, _, pending = struct.unpack("<QqQ", os.pread(memory.number, 24, head))
    if first == head and not pending:
        return
    task.save()
    with calls.opened(task) as workshop:
        workshop.call(task, "set_robust_list", 0, length)


def _members(root: Pid) -> list[Pid]:
    found: list[Pid] = []
    waiting = [root]
    while waiting:
        pid = waiting.pop(0)
        try:
            if stat.read(pid).state in "ZX" and len(tasks.list_tids(pid)) <= 1:
                continue
            found.append(pid)
            waiting += tasks.children(pid)
        except ProcessLookupError:
            continue
    return found


def _stop_new(tree: FrozenTree) -> bool:
    """Seize and stop every thread not yet ours; tell whether there was any."""
    fresh: list[Tracee] = []
    for pid in [tree.root] if tree.alone else _members(tree.root):
        group = tree.tracees.setdefault(pid, {})
        with contextlib.suppress(ProcessLookupError):
            for tid in tasks.list_tids(pid):
                if tid in group:
                    continue
                task = _seize_and_interrupt(tree, pid, tid)
                if task is not None:
                    group[tid] = task
                    fresh.append(task)
    deadline = time.monotonic() + _STOPPED_WITHIN_S
    late: list[Tracee] = []
    for task in fresh:
        try:
            _wait_for(task, deadline)
        except NoProcessError:
            tree.tracees[task.pid].pop(task.tid)
        except BusyError:
            late.append(tree.tracees[task.pid].pop(task.tid))
    if late:
        # Whom they wait for may be one of those we have stopped.
        tree.thaw()
        deadline = time.monotonic() + _LET_GO_WITHIN_S
        for task in late:
            task.let_go_when_stopped(deadline)
        raise BusyError(
            f"thread {late[0].tid} of pid {late[0].pid} waits in the kernel and cannot be stopped now",
            remedy="try again in a moment",
        )
    return bool(fresh)


def _wait_for(task: Tracee, deadline: float) -> None:
    if task.seen_stopped:
        with contextlib.suppress(BusyError):
            task.wait_until_stopped(min(deadline, time.monotonic() + _REPORTED_WITHIN_S))
            return
        # Job control let it go on just before we seized it.
        ptrace.interrupt(task.tid)
    task.wait_until_stopped(deadline)


def _seize_and_interrupt(tree: FrozenTree, pid: Pid, tid: Tid) -> Tracee | None:
    try:
        tree.reposes[tid] = repose = observe(pid, tid)
        task = Tracee.seize(pid, tid)
    except (NoProcessError, ProcessLookupError):
        return None
    # A task that job control stopped reports that by itself; an interrupt on top would later come
    # back as a stop before the first injected instruction.
    task.seen_stopped = repose.stopped
    if not repose.stopped:
        with contextlib.suppress(ProcessLookupError):
            ptrace.interrupt(tid)
    return task


def freeze(root: Pid, *, alone: bool = False) -> FrozenTree:
    """Stop the tree under `root`, or the root alone. The caller thaws it, whatever happens.

    Raises:
        NoProcessError: The root is gone.
        BusyError, AccessError: A thread cannot be seized. Nothing stays stopped.
    """
    tree = FrozenTree(root, alone)
    try:
        while _stop_new(tree):
            pass
        tree.tracees = {pid: group for pid, group in tree.tracees.items() if group}
        if root not in tree.tracees:
            raise _gone(root)
        for pid, group in tree.tracees.items():
            with mem.open_memory(pid) as memory:
                for task in group.values():
                    _note_place(tree, task, memory)
    except ProcessLookupError as error:
        tree.thaw()
        raise BusyError(
            f"a thread under pid {root} ended while it was being stopped", remedy="try again in a moment"
        ) from error
    except BaseException:
        tree.thaw()
        raise
    return tree


def _note_place(tree: FrozenTree, task: Tracee, memory: OwnedFd) -> None:
    """Save a stopped thread, with what the stop itself has done to it set right."""
    task.save()
    if not task.registers.is_64_bit:
        raise UnsupportedStateError(
            "32-bit code",
            where=f"thread {task.tid} of pid {task.pid}",
            why="its system calls are numbered differently",
            remedy="use a 64-bit program",
        )
    changed = abort_critical_section(task, memory)
    if interrupted.correct(task.registers):
        changed = True
        repose = tree.reposes[task.tid]
        if interrupted.has_timeout_register(task.registers) and repose.ran_ns is not None:
            began_ns = tree.schedulers.monotonic_ns(repose.cpu, repose.ran_ns)
            interrupted.shorten(task.registers, time.monotonic_ns() - began_ns)
    changed |= _fill_random(task)
    if changed:
        ptrace.set_registers(task.tid, task.registers)


def _fill_random(task: Tracee) -> bool:
    """Give a getrandom(2) that the stop cut short the rest of its bytes; tell whether there was one."""
    address, length = interrupted.unfilled(task.registers)
    if not 0 < length <= _RANDOM_MOST_BYTES:
        return False
    with contextlib.suppress(OSError):
        # Not past page protections: what the kernel could not write, nobody writes.
        written = mem.write_runs(task.pid, [(address, length)], memoryview(bytearray(os.urandom(length))))
        task.registers.rax += written
        return True
    return False


@contextlib.contextmanager
def frozen(root: Pid) -> Iterator[FrozenTree]:
    """Freeze for the length of the block; on every way out the tree is thawed."""
    tree = freeze(root)
    try:
        yield tree
    finally:
        tree.thaw()


@contextlib.contextmanager
def beside(tid: Tid) -> Iterator[None]:
    """Run on one CPU of the tracee's: each stop then costs a context switch, not a wake-up."""
    before = os.sched_getaffinity(0)
    try:
        with contextlib.suppress(OSError):
            cpu = min(os.sched_getaffinity(tid) & before, default=None)
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})
        yield
    finally:
        os.sched_setaffinity(0, before)
