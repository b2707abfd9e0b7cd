"""Stopping a whole process tree, and letting it go.

Every thread is seized and interrupted before any is waited for: 50 threads stop in half a
millisecond. New threads and children may appear meanwhile, so the list is taken again until it is
stable. While frozen, nothing of the tree runs but what we inject.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

from godwit.errors import NoProcessError
from godwit.linux import ptrace
from godwit.procfs import stat, tasks
from godwit.resources import interrupted
from godwit.resources.thread import Repose, observe
from godwit.tracee.task import Tracee
from godwit.types import Pid, Tid


@dataclass(slots=True)
class FrozenTree:
    """A tree whose threads are all stopped and saved."""

    root: Pid
    # Leader first in each.
    tracees: dict[Pid, dict[Tid, Tracee]] = field(default_factory=dict[Pid, dict[Tid, Tracee]])
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
        for task in self.threads():
            task.unpark()

    def kill(self) -> None:
        """End every process of the tree and take the death notes, threads before their leader."""
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


def _members(root: Pid) -> list[Pid]:
    found: list[Pid] = []
    waiting = [root]
    while waiting:
        pid = waiting.pop(0)
        try:
            if stat.read(pid).state in "ZX":
                continue
            found.append(pid)
            waiting += tasks.children(pid)
        except ProcessLookupError:
            continue
    return found


def _stop_new(tree: FrozenTree) -> bool:
    """Seize and stop every thread not yet ours; tell whether there was any."""
    fresh: list[Tracee] = []
    for pid in _members(tree.root):
        group = tree.tracees.setdefault(pid, {})
        with contextlib.suppress(ProcessLookupError):
            for tid in tasks.list_tids(pid):
                if tid in group:
                    continue
                task = _seize_and_interrupt(tree, pid, tid)
                if task is not None:
                    group[tid] = task
                    fresh.append(task)
    for task in fresh:
        try:
            task.wait_until_stopped()
        except NoProcessError:
            tree.tracees[task.pid].pop(task.tid)
    return bool(fresh)


def _seize_and_interrupt(tree: FrozenTree, pid: Pid, tid: Tid) -> Tracee | None:
    try:
        tree.reposes[tid] = observe(pid, tid)
        stopped = stat.read(pid, tid).state == "T"
        task = Tracee.seize(pid, tid)
    except (NoProcessError, ProcessLookupError):
        return None
    # A task that job control stopped reports that by itself; an interrupt on top would later come
    # back as a stop before the first injected instruction.
    if not stopped:
        with contextlib.suppress(ProcessLookupError):
            ptrace.interrupt(tid)
    return task


def freeze(root: Pid) -> FrozenTree:
    """Stop the tree under `root`. The caller thaws it, whatever happens.

    Raises:
        NoProcessError: The root is gone.
        BusyError, AccessError: A thread cannot be seized. Nothing stays stopped.
    """
    tree = FrozenTree(root)
    try:
        while _stop_new(tree):
            pass
        tree.tracees = {pid: group for pid, group in tree.tracees.items() if group}
        if root not in tree.tracees:
            raise NoProcessError(f"process {root} ended before it could be stopped")
        for task in tree.threads():
            task.save()
            if interrupted.correct(task.registers):
                ptrace.set_registers(task.tid, task.registers)
    except BaseException:
        tree.thaw()
        raise
    return tree


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
