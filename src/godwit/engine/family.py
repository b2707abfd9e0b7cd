"""Making all processes of a tree with the right parents, sessions and process groups.

A session and a group keep their number after the leader has died, so a leader that is not in the
tree is stood in for: a placeholder of that pid leads for as long as the family is being made.
setsid(2), setpgid(2), credentials(7).
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from godwit.engine import stub as stubs
from godwit.engine.stub import Stub
from godwit.errors import BusyError, DestinationError, Refusal, RefusedError
from godwit.linux import ptrace
from godwit.resources.process import IdentityEntry, ProcessState
from godwit.tracee.task import ALL_SIGNALS, Tracee
from godwit.types import Tid

_WALL = 0x40000000


@dataclass(slots=True)
class Family:
    """The stubs of a tree by pid in its own namespace, and the placeholders among them."""

    identities: tuple[IdentityEntry, ...]
    founder: Stub
    """The seed: a pod's init, or a placeholder, or the root itself."""
    stubs: dict[int, Stub] = field(default_factory=dict[int, Stub])
    placeholders: dict[int, tuple[Stub, Stub | None]] = field(
        default_factory=dict[int, tuple[Stub, Stub | None]]
    )
    """By pid: the stub, and the stub that is its parent (None: our own child)."""
    sessions: dict[int, int] = field(default_factory=dict[int, int])
    """Of every stub: the session it is in by now."""

    def children(self) -> dict[int, list[IdentityEntry]]:
        """Return the children of each pid, in order."""
        found: dict[int, list[IdentityEntry]] = defaultdict(list)
        for identity in self.identities[1:]:
            found[identity.ppid].append(identity)
        return found


def session_refusal(identities: Sequence[IdentityEntry]) -> Refusal | None:
    """Check that the sessions of a tree can be made again; return why not, or None.

    A process is in its parent's session, or leads one, or is in the session of a leader that has
    gone or is its own sibling. Others take a history we cannot repeat.
    """
    by_pid = {identity.pid: identity for identity in identities}
    for identity in identities[1:]:
        leader = by_pid.get(identity.sid)
        parent = by_pid.get(identity.ppid)
        if leader is None or parent is None or leader.pid in (identity.pid, parent.pid):
            continue
        if parent.sid != identity.sid and leader.ppid != identity.ppid:
            return Refusal(
                what=f"session {identity.sid}",
                where=f"pid {identity.pid}",
                why="its leader is neither its ancestor nor its sibling any more",
                remedy="move the session leader's tree instead",
            )
    return None


def raise_family(family: Family, *, in_pod: bool) -> None:
    """Make every process. Afterwards ids, parents, sessions and groups are those of the image."""
    root = family.identities[0]
    founder = family.founder
    children = family.children()
    family.sessions[founder.inner] = founder.inner if in_pod else os.getsid(0)
    if founder.inner == root.pid:
        family.stubs[root.pid] = founder
    elif in_pod:
        _make_root_in_pod(family, root)
    else:
        family.placeholders[founder.inner] = (founder, None)
        founder.call("setsid")
        family.sessions[founder.inner] = founder.inner
        _make(family, founder, root, sibling=True)
    _raise_children(family, root, children)
    _set_groups(family, family.identities)
    _dismiss_all(family)
    for identity in family.identities:
        if identity.state is ProcessState.ZOMBIE:
            _end(family, identity)


def _make(family: Family, parent: Stub, identity: IdentityEntry, *, sibling: bool = False) -> Stub:
    made = stubs.clone_process(
        parent, identity.pid, exit_signal=identity.exit_signal or signal.SIGCHLD, sibling=sibling
    )
    family.stubs[identity.pid] = made
    family.sessions[identity.pid] = family.sessions[parent.inner]
    return made


def _make_root_in_pod(family: Family, root: IdentityEntry) -> None:
    init = family.founder
    if root.sid in (0, init.inner, root.pid):
        _make(family, init, root)
        return
    leader = _placeholder(family, init, root.sid)
    _make(family, leader, root, sibling=True)


def _placeholder(family: Family, parent: Stub, pid: int, *, session: bool = True) -> Stub:
    """Make a process that leads session (or group) `pid` until all is made."""
    made = stubs.clone_process(parent, pid, exit_signal=0)
    family.placeholders[pid] = (made, parent)
    family.sessions[pid] = family.sessions[parent.inner]
    if session:
        made.call("setsid")
        family.sessions[pid] = pid
    else:
        made.call("setpgid", 0, 0)
    return made


def _raise_children(
    family: Family, identity: IdentityEntry, children: dict[int, list[IdentityEntry]]
) -> None:
    stub = family.stubs[identity.pid]
    mine = children.get(identity.pid, [])
    leads = identity.sid == identity.pid
    before = family.sessions[identity.pid]
    # A child born before its parent left for a session of its own is in the older one.
    early = [child for child in mine if leads and child.sid == before != identity.pid]
    for child in early:
        _make(family, stub, child)
    if leads and family.sessions[identity.pid] != identity.pid:
        stub.call("setsid")
        family.sessions[identity.pid] = identity.pid
    pids = {child.pid for child in mine}
    # Leaders first: a sibling may come from them.
    late = sorted((child for child in mine if child not in early), key=lambda child: child.sid in pids)
    late.sort(key=lambda child: child.sid != child.pid)
    for child in late:
        _make_late_child(family, stub, child)
    for child in mine:
        _raise_children(family, child, children)


def _make_late_child(family: Family, parent: Stub, child: IdentityEntry) -> None:
    if child.sid in (child.pid, family.sessions[parent.inner], 0):
        made = _make(family, parent, child)
        if child.sid == child.pid and family.sessions[child.pid] != child.pid:
            made.call("setsid")
            family.sessions[child.pid] = child.pid
        return
    leader = family.stubs.get(child.sid)
    if leader is None:
        known = family.placeholders.get(child.sid)
        leader = known[0] if known else _placeholder(family, parent, child.sid)
        if known and known[1] is not parent:
            raise RefusedError(
                [
                    Refusal(
                        what=f"session {child.sid}",
                        where=f"pid {child.pid}",
                        why="its leader has gone and its members have several parents",
                        remedy="move a larger tree",
                    )
                ]
            )
    _make(family, leader, child, sibling=True)


def _set_groups(family: Family, identities: Sequence[IdentityEntry]) -> None:
    """Give everybody their process group; leaders of groups come first."""
    for identity in identities:
        if identity.pgid == identity.pid and identity.sid != identity.pid:
            family.stubs[identity.pid].call("setpgid", 0, 0)
    for identity in identities:
        if identity.pgid in (identity.pid, 0):
            continue
        stub = family.stubs[identity.pid]
        if stub.call("getpgid", 0) == identity.pgid:
            continue
        if identity.pgid not in family.stubs and identity.pgid not in family.placeholders:
            _stand_in_for_group(family, stub, identity.pgid)
        try:
            stub.call("setpgid", 0, identity.pgid)
        except PermissionError as error:
            if identity is not family.identities[0] and identity.sid == family.sessions[identity.pid]:
                raise DestinationError(
                    f"pid {identity.pid} cannot join process group {identity.pgid}",
                    remedy="restore with --pod",
                ) from error
            # The root's group lives outside; it then stays in the group of whoever restores it.


def _stand_in_for_group(family: Family, member: Stub, pgid: int) -> None:
    try:
        _placeholder(family, member, pgid, session=False)
    except BusyError:
        return  # The leader lives, outside the tree: the group is there to be joined.


def _dismiss_all(family: Family) -> None:
    for pid in list(family.placeholders):
        _dismiss(family, pid)


def _dismiss(family: Family, pid: int) -> None:
    """End a placeholder and have its parent reap it."""
    made, parent = family.placeholders.pop(pid)
    stubs.kill(made.task)
    made.close()
    if parent is not None:
        parent.call("wait4", pid, 0, _WALL, 0)


def _end(family: Family, identity: IdentityEntry) -> None:
    """Make a zombie: end a stub with the recorded status and leave it to its parent."""
    stub = family.stubs.pop(identity.pid)
    task = stub.task
    if identity.comm:
        stub.call("prctl", 15, identity.comm[:15] + b"\0", 0, 0, 0)
    if os.WIFSIGNALED(identity.wait_status):
        number = os.WTERMSIG(identity.wait_status)
        ptrace.set_signal_mask(task.tid, ALL_SIGNALS & ~(1 << (number - 1)))
        os.kill(task.pid, number)
        _run_to_the_end(stub)
    else:
        batch = stub.batch()
        batch.add("exit_group", os.WEXITSTATUS(identity.wait_status))
        batch.enter()
        _run_to_the_end(stub)
    stub.close()


def adapt(family: Family, identities: tuple[IdentityEntry, ...]) -> list[int]:
    """Let processes and threads end and come to be, until the family is this; return new processes' pids.

    That it can be done so, `reshape.adaptable` has said. A new process has its parent's memory.
    """
    before = {identity.pid: identity for identity in family.identities}
    wanted = {identity.pid for identity in identities}
    # Parents come before their children, and outlive them here.
    for identity in reversed(family.identities):
        if identity.pid not in wanted:
            _remove(family, identity)
    new = [identity for identity in identities if identity.pid not in before]
    for identity in new:
        _make_late_child(family, family.stubs[identity.ppid], identity)
    _set_groups(family, new)
    _dismiss_all(family)
    _adapt_threads(family, identities)
    for identity in identities:
        if identity.state is ProcessState.ZOMBIE and identity.pid in family.stubs:
            _end(family, identity)
    family.identities = identities
    return [identity.pid for identity in new if identity.state is not ProcessState.ZOMBIE]


def _remove(family: Family, identity: IdentityEntry) -> None:
    """End a process and have its parent reap it."""
    stub = family.stubs.pop(identity.pid, None)
    if stub is not None:
        for task in [*stub.threads.values()][::-1]:
            stubs.kill(task)
        stub.close()
    family.stubs[identity.ppid].call("wait4", identity.pid, 0, _WALL, 0)


def _adapt_threads(family: Family, identities: Sequence[IdentityEntry]) -> None:
    for identity in identities:
        stub = family.stubs.get(identity.pid)
        if stub is None:
            continue
        for gone in [inner for inner in stub.threads if inner not in identity.tids]:
            _end_thread(stub, stub.threads.pop(gone))
        stubs.clone_threads(stub, [tid for tid in identity.tids if tid not in stub.threads])


def _end_thread(stub: Stub, task: Tracee) -> None:
    batch = stub.batch(task)
    batch.add("exit", 0)
    batch.enter()
    _run_until_exited(task.tid)


def _run_to_the_end(stub: Stub) -> None:
    _run_until_exited(stub.task.tid)


def _run_until_exited(tid: Tid) -> None:
    ptrace.resume(tid)
    while True:
        stop = ptrace.wait_stop(tid)
        if stop.exited:
            return
        ptrace.resume(tid, 0 if stop.event else stop.signal)
