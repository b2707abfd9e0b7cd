"""Every holding of a tree with its disposition: what `godwit check` prints and `migrate` obeys."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from godwit.engine import freeze
from godwit.engine import view as views
from godwit.engine.capture import identities
from godwit.engine.family import session_refusal
from godwit.engine.freeze import FrozenTree
from godwit.engine.layout import removed_links
from godwit.engine.obstacles import (
    leader_refusals,
    memory_sharing,
    refuse,
    state_refusals,
    sysv_refusals,
    thread_refusals,
)
from godwit.engine.outside import mapped_outside, newcomer, shared_outside
from godwit.engine.view import ProcessView, TreeView
from godwit.errors import (
    BusyError,
    Refusal,
    RefusedError,
    UnsupportedStateError,
)
from godwit.linux import pagemap
from godwit.linux.pause import pause
from godwit.procfs import tasks
from godwit.procfs.maps import Mapping
from godwit.resources import fdtable, memory, registry
from godwit.resources.base import Disposition, Finding, OpenFile
from godwit.types import OwnedFd, Pid

# A holding that cannot be carried is refused when it is seen at so many looks.
LOOKS: Final = 8
PAUSE_S: Final = 0.013
_QUICK_LOOKS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a tree holds and what a move would do about each holding."""

    pid: int
    comm: str
    findings: tuple[Finding, ...]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What stands in the way."""
        return tuple(
            finding.refusal() for finding in self.findings if finding.disposition is Disposition.REFUSE
        )

    @property
    def movable(self) -> bool:
        """Nothing stands in the way."""
        return not self.refusals

    def obey(self) -> None:
        """Raise RefusedError if anything stands in the way."""
        if self.refusals:
            raise RefusedError(self.refusals)


def plan(tree: TreeView) -> Plan:
    """List every holding of a tree. Nothing is stopped or changed."""
    neighbours = frozenset(tasks.list_pids())
    findings = [finding for process in tree.processes for finding in _process_findings(process, tree)]
    for file in tree.files:
        findings += _file_findings(file, tree)
    findings += sysv_refusals(tree)
    outside = mapped_outside(tree)
    if outside is not None:
        findings.append(
            refuse(
                f"shared memory {os.fsdecode(outside[1])}",
                f"pid {tree.root.pid}",
                f"pid {outside[0]}, which does not move along, maps it too",
                f"move a process that is an ancestor of pid {outside[0]} too, or end pid {outside[0]}",
            )
        )
    # Who was there before we looked has been looked at; whom others leave behind from now on has not.
    tree.memory.neighbours = neighbours
    return Plan(pid=tree.root.pid, comm=tree.root.stat.comm, findings=tuple(findings))


def movable(pid: Pid, memory_: views.Memory) -> Plan:
    """Plan a move of a running tree that nothing stands in the way of.

    A program may hold for a moment what cannot be carried, so it is looked at some times.

    Raises:
        RefusedError: Something stood in the way at every look.
    """
    found = looked_at(pid, memory_)
    found.obey()
    return found


def looked_at(pid: Pid, memory_: views.Memory) -> Plan:
    """Plan a move of a running tree as `movable` does; what still stands in the way is in the plan."""
    _, found = views.settled(pid, memory_, plan)
    for _ in range(LOOKS - 1):
        if found.movable:
            break
        pause(PAUSE_S)
        memory_.outside = None
        _, found = views.settled(pid, memory_, plan)
    return found


@contextlib.contextmanager
def frozen(
    pid: Pid, memory_: views.Memory, begin: Callable[[], None], check: Callable[[], None]
) -> Iterator[tuple[FrozenTree, TreeView]]:
    """Freeze a tree in a state that can be carried; thaw it at the end of the block.

    What it opened since it was looked at may be in the way, and often is for a moment only: then it runs
    on for a while, and is frozen again.

    Args:
        pid: The root.
        memory_: Of earlier looks.
        begin: Called right before each try.
        check: Called between tries; what it raises ends them.

    Raises:
        RefusedError: Something was in the way at every try.
        BusyError: It could not be stopped at the last.
    """
    for tries_left in reversed(range(LOOKS)):
        begin()
        # Not that the program stands still for a walk through its page tables, if that can be helped.
        memory_.may_walk = not memory_.tracked or tries_left < LOOKS - _QUICK_LOOKS
        try:
            tree = freeze.freeze(pid)
        except BusyError:
            if not tries_left:
                raise
            pause(PAUSE_S)
        else:
            with contextlib.ExitStack() as thawing:
                thawing.callback(tree.thaw)
                looked = _look_frozen(pid, memory_)
                memory_.may_walk = True
                if looked is not None and looked[1].movable:
                    yield tree, looked[0]
                    return
            if looked is not None and not tries_left:
                looked[1].obey()
            if looked is None:
                views.settled(pid, memory_, lambda _: None)
            else:
                pause(PAUSE_S)
        check()


def _look_frozen(pid: Pid, memory_: views.Memory) -> tuple[TreeView, Plan] | None:
    """Look at a frozen tree, and plan; None if that would take long."""
    try:
        view = views.look(pid, memory_)
    except views.MappingsChangedError:
        return None
    return view, plan_frozen(view)


def plan_frozen(tree: TreeView) -> Plan:
    """List what can have changed since `plan`, as far as it stands in the way. The tree is frozen by us."""
    findings: list[Finding] = []
    for process in tree.processes:
        where = f"pid {process.pid}"
        if process.zombie:
            continue
        findings += [*leader_refusals(process, where), *memory_sharing(process, tree, where)]
        findings += thread_refusals(process, where)
        for mapping in process.mappings:
            refusal = memory.refusal(mapping, process.pid)
            if refusal is not None:
                findings.append(refuse(refusal.what, refusal.where, refusal.why, refusal.remedy))
    findings += newcomer_refusals(tree)
    refused = [registry.kind_of(file).inspect(file, tree) for file in tree.files]
    findings += [finding for finding in refused if finding.disposition is Disposition.REFUSE]
    return Plan(pid=tree.root.pid, comm=tree.root.stat.comm, findings=tuple(findings))


def obey_newcomers(tree: TreeView) -> None:
    """Raise RefusedError as `newcomer_refusals` finds. Whom this lets pass, a freeze need not look at."""
    Plan(pid=tree.root.pid, comm=tree.root.stat.comm, findings=tuple(newcomer_refusals(tree))).obey()


def newcomer_refusals(tree: TreeView) -> Iterator[Finding]:
    """Refuse who left the tree meanwhile and still shares something with it."""
    found = newcomer(tree)
    if found is not None:
        pid, what = found
        yield refuse(
            what,
            f"pid {tree.root.pid}",
            f"pid {pid}, which was born since and does not move along, shares it",
            f"move a process that is an ancestor of pid {pid} too, or end pid {pid}",
        )


def _file_findings(file: OpenFile, tree: TreeView) -> Iterator[Finding]:
    finding = registry.kind_of(file).inspect(file, tree)
    yield finding
    if finding.disposition is Disposition.REFUSE:
        return
    other = shared_outside(tree, file)
    if other is not None:
        yield refuse(
            f"open file {file.link}",
            file.where,
            f"pid {other}, which does not move along, shares it",
            f"move a process that is an ancestor of pid {other} too, or end pid {other}",
        )
    try:
        fdtable.collect_common(file, tree.inner, tree.inner_groups)
    except UnsupportedStateError as error:
        yield from (refuse(each.what, each.where, each.why, each.remedy) for each in error.refusals)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EBADF, errno.ENOENT):
            raise


def _process_findings(process: ProcessView, tree: TreeView) -> Iterator[Finding]:
    where = f"pid {process.pid}"
    if process.zombie:
        yield Finding(
            disposition=Disposition.MOVE, what="zombie", where=where, why="its exit status goes along"
        )
        return
    if process.leaderless:
        yield from leader_refusals(process, where)
        return
    count = len(process.tids)
    yield Finding(
        disposition=Disposition.MOVE,
        what=f"process {process.stat.comm} with {count} thread{'s' if count > 1 else ''}",
        where=where,
    )
    yield from state_refusals(process, tree, where)
    yield from (refuse(each.what, each.where, each.why, each.remedy) for each in removed_links(process.pid))
    yield from _memory_findings(process, where)
    yield from _tie_findings(process, tree, where)


def _memory_findings(process: ProcessView, where: str) -> Iterator[Finding]:
    private = sum(mapping.anonymous_bytes + mapping.swap_bytes for mapping in process.mappings)
    yield Finding(
        disposition=Disposition.MOVE,
        what=f"{private // 1024} KiB of memory in {len(process.mappings)} mappings",
        where=where,
    )
    if _guarded(process):
        found = guard_refusal(where)
        yield refuse(found.what, found.where, found.why, found.remedy)
    seen: set[str] = set()
    for mapping in process.mappings:
        refusal = memory.refusal(mapping, process.pid)
        if refusal is not None:
            yield refuse(refusal.what, refusal.where, refusal.why, refusal.remedy)
        elif _is_library(mapping) and mapping.path not in seen:
            seen.add(mapping.path)
            yield Finding(
                disposition=Disposition.REBIND,
                what=f"mapped file {mapping.path}",
                where=where,
                why="the destination's own, if it is equal",
            )


def guard_refusal(where: str) -> Refusal:
    """Say that guard pages stand in the way."""
    return Refusal(
        what="guard pages inside a mapping",
        where=where,
        why="madvise(MADV_GUARD_INSTALL) is not carried yet",
        remedy="start it with GLIBC_TUNABLES=glibc.pthread.stack_guard_madvise=0 if the C library makes them",
    )


def _guarded(process: ProcessView) -> bool:
    with OwnedFd(os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
        return any(
            pagemap.has_guard_pages(descriptor.number, mapping.start, mapping.end)
            for mapping in process.mappings
            if not mapping.shared and not mapping.inode and not mapping.path.startswith("[v")
        )


def _is_library(mapping: Mapping) -> bool:
    return bool(mapping.inode) and views.object_kind(mapping) is None and mapping.path.startswith("/")


def _tie_findings(process: ProcessView, tree: TreeView, where: str) -> Iterator[Finding]:
    if process is tree.root:
        refusal = session_refusal(identities(tree))
        if refusal is not None:
            yield refuse(refusal.what, refusal.where, refusal.why, refusal.remedy)
        yield Finding(
            disposition=Disposition.REBIND,
            what=f"parent pid {process.stat.ppid}",
            where=where,
            why="the init of its pod, or who restores it, becomes its parent",
        )
        yield Finding(
            disposition=Disposition.REBIND,
            what="CPU time used so far",
            where=where,
            why="the kernel counts from zero again: times(2), CLOCK_PROCESS_CPUTIME_ID",
        )
    if process.stat.tty_nr:
        yield Finding(
            disposition=Disposition.REBIND,
            what="controlling terminal",
            where=where,
            why="it holds no descriptor of it and goes on without",
        )
