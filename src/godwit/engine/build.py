"""Building processes at the destination: address spaces, descriptors, everything else, registers.

The order is that of the facts: ids first, while the stubs are tiny; then mappings, then pages; then
what belongs to the process; then what each thread must do for itself; registers last. Until
`release` nothing of it runs.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from godwit.engine import finish, latecomers, missing, space
from godwit.engine.groundwork import Groundwork
from godwit.engine.latecomers import LateSignal
from godwit.engine.openpaths import OpenPaths
from godwit.engine.stub import Stub
from godwit.errors import DestinationError, ImageError, NoProcessError
from godwit.linux import ptrace
from godwit.procfs import status
from godwit.resources import fdtable, objects, signals
from godwit.resources.base import FileKind
from godwit.resources.outline import outline_of
from godwit.resources.process import ProcessEntry, ProcessState, TreeEntry
from godwit.resources.roots import Root
from godwit.tracee import calls
from godwit.tracee.task import Tracee
from godwit.types import Fd, FileId, OwnedFd, Pid


@dataclass(slots=True)
class Builder(Groundwork):
    """A tree under construction. `destroy` undoes everything at any time before `release`."""

    clock_shift_ns: int = 0  # how far the tree's CLOCK_MONOTONIC is ahead of ours
    clock_jump_ns: int = 0  # how far, at most, it has jumped ahead on the way: sleeps last so much longer
    tree: TreeEntry | None = None
    files: dict[FileId, OwnedFd] = field(default_factory=dict[FileId, OwnedFd])
    kept_at: dict[int, int] = field(default_factory=dict[int, int])
    """Numbers in the pod's init of the userfaultfds that it holds, by the tree's own pid."""
    _held: list[Stub] = field(default_factory=list[Stub])
    _parked: bool = False

    # --- the rest -----------------------------------------------------------------------------

    def equip(self, tree: TreeEntry, files: Sequence[tuple[FileKind, Any]]) -> None:
        """Give every process and thread what needs no pages: done while the pages are on their way."""
        assert self.family is not None
        self.tree = tree
        self._restore_files(tree, files)
        for process in tree.processes:
            self._install_descriptors(process)
        context = finish.Attachment(self.family, tree)
        for kind, body in files:
            if kind.attach is not None:
                kind.attach(body, context)
        context.set_owners()
        for process in tree.processes:
            stub = self.family.stubs[process.identity.pid]
            stub.workshop.trap_signal = calls.free_trap_signal(_waiting_signals(process))
            with OpenPaths(outline_of(tree), self.root) as paths:
                finish.process(stub, process, paths.open)
            # Its threads are all as its maker was.
            current = status.read(stub.pid)
            # The leader last: a change of user in any thread clears what it restores for the process.
            for thread in reversed(process.threads):
                finish.thread(stub, process, thread, current)

    def complete(self) -> None:
        """Give every process the rest, now that its pages are there. All are then one call from running."""
        assert self.family is not None
        assert self.tree is not None
        lockers = {lock.holder for lock in self.tree.locks}
        if self.reshaped:
            for entry in self.tree.processes:
                space.verify(self.family.stubs[entry.identity.pid], entry.memory.vmas)
        if self.left:
            self._hand_over_uffds()
        for kept, made in self.objects.values():
            objects.seal(kept, made.number)
        for entry in self.tree.processes:
            process = finish.prolonged(entry, self.clock_jump_ns)
            stub = self.family.stubs[process.identity.pid]
            space.finish_vmas(stub, process.memory.vmas)
            finish.sleeps(stub, process, self.clock_shift_ns)
            finish.notes(stub, process)
            if self.left.get(stub.inner):
                uffd = self.uffds[stub.inner].number
                missing.leave(stub, uffd, process.memory.vmas, self.left[stub.inner])
            if process.identity.pid in lockers:
                self._held.append(stub)
            else:
                finish.registers(stub, process)
        for fd in self.files.values():
            fd.close()
        self.files.clear()

    def _hand_over_uffds(self) -> None:
        """Have the pod's init hold what must not be closed before the last page has come."""
        assert self.family is not None
        pids = sorted(self.left)
        numbers = self.family.founder.deliver([self.uffds[pid].number for pid in pids])
        self.kept_at = dict(zip(pids, numbers, strict=True))

    def take_uffds(self) -> dict[int, OwnedFd]:
        """Give away the userfaultfds of the processes that lack pages, by pid of the tree; close the rest."""
        taken = {pid: self.uffds.pop(pid) for pid in list(self.uffds) if pid in self.left}
        for uffd in self.uffds.values():
            uffd.close()
        self.uffds.clear()
        return taken

    def _restore_files(self, tree: TreeEntry, files: Sequence[tuple[FileKind, Any]]) -> None:
        context = _FileContext(self, Pid(tree.identities[0].pid))
        for kind, entry in files:
            self.files.update(kind.restore(entry, context))
        for common in tree.common:
            fd = self.files.get(common.file_id)
            if fd is None:
                raise ImageError(f"the image lacks open file {common.file_id}")
            fdtable.restore_flags(common, fd.number)

    def _install_descriptors(self, process: ProcessEntry) -> None:
        assert self.family is not None
        wanted: dict[FileId, Fd] = {}
        for slot in process.descriptors:
            if slot.file_id not in self.files:
                raise ImageError(f"descriptor {slot.fd} refers to open file {slot.file_id}, which is missing")
            wanted[slot.file_id] = self.files[slot.file_id].number
        finish.descriptors(self.family.stubs[process.identity.pid], process.descriptors, wanted)

    # --- the end ------------------------------------------------------------------------------

    def park(self) -> None:
        """See to it that what we let go of stays stopped. Our death still kills it."""
        for stub in self._all_stubs():
            for task in stub.threads.values():
                task.park()
        self._parked = True

    def outlive(self) -> None:
        """From now on our death leaves the parked processes stopped, neither dead nor running."""
        for stub in self._all_stubs():
            for task in stub.threads.values():
                ptrace.set_options(task.tid, 0)

    def check_alive(self) -> None:
        """See that nobody has killed what was built, before it ever ran. Raises DestinationError."""
        for stub in self._all_stubs():
            try:
                # Fails from the moment on in which the signal is sent.
                ptrace.get_registers(stub.task.tid)
            except ProcessLookupError as error:
                raise DestinationError(
                    "what was built was killed before it ran", remedy="try again"
                ) from error

    def take_locks(self) -> None:
        """Take the record locks, and then complete who holds them.

        Raises:
            DestinationError: Somebody else has one.
        """
        assert self.family is not None
        assert self.tree is not None
        for lock in self.tree.locks:
            name, arguments = fdtable.lock_call(lock, take=True)
            try:
                self.family.stubs[lock.holder].call(name, *arguments)
            except OSError as error:
                if not fdtable.is_conflict(error):
                    raise
                raise DestinationError(
                    f"pid {lock.holder} cannot have its {lock.kind} lock back: somebody else took it",
                    remedy="try again when the other program has let it go",
                ) from error
        by_pid = {process.identity.pid: process for process in self.tree.processes}
        for stub in self._held:
            finish.registers(stub, by_pid[stub.inner])
        self._held.clear()

    def deliver(self, late: Sequence[LateSignal]) -> None:
        """Queue signals that came to the tree after it was captured; those for nobody of it are dropped."""
        assert self.family is not None
        for each in late:
            stub = self.family.stubs.get(each.pid)
            task = stub.threads.get(each.tid) if stub is not None and each.tid else None
            if stub is not None and len(each.info) == ptrace.SIGINFO_BYTES and (task or not each.tid):
                latecomers.deliver(each, stub.pid, task.tid if task else None)

    def release(self) -> None:
        """Let everything run. There is no way back."""
        assert self.family is not None
        assert self.tree is not None
        stopped = {
            identity.pid for identity in self.tree.identities if identity.state is ProcessState.STOPPED
        }
        if self._parked or stopped:
            self._bring_to_their_stops()
        for stub in self._all_stubs():
            # The leader last: it may end the process at once, and we must have let go of the others.
            for task in reversed(stub.threads.values()):
                _let_go(task, signal.SIGSTOP if stub.inner in stopped else 0)
        self._close()

    def _bring_to_their_stops(self) -> None:
        """Bring every thread to the delivery of its SIGSTOP, which detaching then grants or takes back."""
        if not self._parked:
            self.park()
        for stub in self._all_stubs():
            for task in stub.threads.values():
                others = [other for other in stub.threads.values() if other is not task]
                # A signal that waited, or whoever kills it now, may end one; the others go on all the same.
                with contextlib.suppress(NoProcessError):
                    task.unpark(others)

    def root_pid(self) -> Pid:
        """Return the root's pid in our namespace."""
        assert self.family is not None
        return self.family.stubs[self.family.identities[0].pid].pid

    def outer_pids(self) -> Mapping[int, Pid]:
        """Return our pid of every process by the tree's own."""
        assert self.family is not None
        return {inner: stub.pid for inner, stub in self.family.stubs.items()}

    def init_pid(self) -> Pid | None:
        """Return the pid of the pod's init in our namespace; None outside a pod."""
        return self.family.founder.pid if self.family is not None and self.in_pod else None

    def _all_stubs(self) -> list[Stub]:
        assert self.family is not None
        found = list(self.family.stubs.values())
        if self.in_pod:
            found.append(self.family.founder)
        return found

    def destroy(self) -> None:
        """Kill everything that was made. Nothing of it has run."""
        self._held.clear()
        self._discard()
        self._close()

    def _close(self) -> None:
        self.transfer.close()
        if self.family is not None:
            for stub in self._all_stubs():
                stub.close()
        for fd in (*self.files.values(), *(made_object for _, made_object in self.objects.values())):
            fd.close()
        self.files.clear()
        self.objects.clear()


class _FileContext:
    """Answers what kinds of open files ask. Satisfies `RestoreContext`."""

    def __init__(self, builder: Builder, inner_pid: Pid) -> None:
        self._builder = builder
        self.inner_pid = inner_pid

    @property
    def files(self) -> Mapping[FileId, OwnedFd]:
        return self._builder.files

    @property
    def root(self) -> Root:
        return self._builder.root

    def memory_object(self, object_id: int) -> OwnedFd:
        return self._builder.memory_object(object_id)


def _let_go(task: Tracee, number: int) -> None:
    try:
        ptrace.detach(task.tid, number)
    except ProcessLookupError:
        # It has ended already, and shows as a zombie until its tracer takes notice.
        task.wait_until_gone()


def _waiting_signals(process: ProcessEntry) -> int:
    """Return the set of signals that wait for the process or one of its threads."""
    infos = [*process.signals.pending, *(info for own in process.threads for info in own.pending)]
    taken = 0
    for info in infos:
        taken |= 1 << (signals.number_of(info) - 1)
    return taken
