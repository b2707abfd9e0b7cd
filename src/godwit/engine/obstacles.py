"""What a process tree is or shares that stands in the way of a move: refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator

from godwit.engine.view import ProcessView, TreeView
from godwit.linux import kcmp, sysvipc
from godwit.procfs import status, tasks
from godwit.resources.base import Disposition, Finding
from godwit.types import Pid, Tid


def refuse(what: str, where: str, why: str, remedy: str = "") -> Finding:
    """Say that a holding stands in the way."""
    return Finding(disposition=Disposition.REFUSE, what=what, where=where, why=why, remedy=remedy)


def state_refusals(process: ProcessView, tree: TreeView, where: str) -> Iterator[Finding]:
    """Refuse what a process is or shares that cannot be made again."""
    own = process.status
    if own.seccomp:
        yield refuse(
            "seccomp filter", where, "filters are not carried yet", "start the program without its sandbox"
        )
    # A tree that changes all the time is looked at while we hold it still.
    if own.tracer_pid not in (0, os.getpid()):
        yield refuse("tracer", where, f"pid {own.tracer_pid} traces it", "end the debugger or tracer first")
    if own.nspid[-1] == 1:
        yield refuse(
            "first process of a pid namespace",
            where,
            "the others of its namespace end with it",
            "move one of its children instead",
        )
    if _is_32_bit(process.pid):
        yield refuse(
            "32-bit program", where, "its system calls are numbered differently", "use its 64-bit version"
        )
    root = tree.root
    for kind in ("user", "pid", "net", "mnt", "ipc", "uts"):
        theirs, roots = tasks.namespaces(process.pid).get(kind), tasks.namespaces(root.pid).get(kind)
        ours = tasks.namespaces(Pid(os.getpid())).get(kind)
        if theirs != roots:
            yield refuse(
                f"{kind} namespace of its own",
                where,
                "a tree must be in one",
                "move the inner tree by itself",
            )
        elif kind == "user" and theirs != ours:
            yield refuse("user namespace", where, "it is not ours", "run godwit inside of that namespace")
    yield from memory_sharing(process, tree, where)
    yield from thread_refusals(process, where)


def _is_32_bit(pid: Pid) -> bool:
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            return file.read(5) == b"\x7fELF\x01"
    except FileNotFoundError:
        return False  # Refused elsewhere: its program was removed.


def leader_refusals(process: ProcessView, where: str) -> Iterator[Finding]:
    """Refuse a process whose first thread has ended."""
    if process.leaderless:
        yield refuse(
            "process whose first thread has ended",
            where,
            "the kernel shows little of it, so it is not carried yet",
            "let its main function wait for the threads instead of pthread_exit(3)",
        )


def memory_sharing(process: ProcessView, tree: TreeView, where: str) -> Iterator[Finding]:
    """Refuse a process that shares with another of the tree what only threads may."""
    earlier = [other.pid for other in tree.processes if not other.zombie and other.pid < process.pid]
    if any(kcmp.same_part(process.pid, other, kcmp.KCMP_VM) for other in earlier):
        yield refuse(
            "memory shared with another process",
            where,
            "it was made by vfork(2) or clone(2) with CLONE_VM and has not executed a program yet",
            "try again in a moment",
        )
        return
    for part, name in (
        (kcmp.KCMP_FILES, "descriptor table"),
        (kcmp.KCMP_FS, "working directory"),
        (kcmp.KCMP_SIGHAND, "signal actions"),
    ):
        if any(kcmp.same_part(process.pid, other, part) for other in earlier):
            yield refuse(
                f"{name} shared with another process",
                where,
                "processes made by clone(2) with shared parts are not carried yet",
                "use threads, or fork(2)",
            )


def thread_refusals(process: ProcessView, where: str) -> Iterator[Finding]:
    """Refuse threads that differ from their leader in what all threads must have in common."""
    if len(process.tids) == 1:
        return
    try:
        leaders = status.read_standing(process.pid, Tid(process.pid))
    except ProcessLookupError:
        return
    for tid in process.tids[1:]:
        try:
            yield from _differences(process.pid, tid, leaders, where)
        except ProcessLookupError:
            continue  # It has ended meanwhile.


def _differences(pid: Pid, tid: Tid, leaders: tuple[bytes, ...], where: str) -> Iterator[Finding]:
    for part, name in ((kcmp.KCMP_FILES, "descriptor table"), (kcmp.KCMP_FS, "working directory")):
        if not kcmp.same_part(pid, Pid(tid), part):
            yield refuse(
                f"thread {tid} with a {name} of its own", where, "unshare(2) in threads is not carried yet"
            )
    if status.read_standing(pid, tid) != leaders:
        yield refuse(
            f"thread {tid} with a user, capabilities or seccomp filter of its own",
            where,
            "only what all threads of a process share is carried yet",
            "let every thread change together, as the C library does",
        )


def sysv_refusals(tree: TreeView) -> Iterator[Finding]:
    """Refuse who used System V objects, as far as the kernel remembers: the last user of each."""
    if tasks.namespaces(tree.root.pid).get("ipc") != tasks.namespaces(Pid(os.getpid())).get("ipc"):
        return
    for what, users in (
        ("semaphores", sysvipc.users_of_semaphores()),
        ("message queue", sysvipc.users_of_queues()),
    ):
        for ident, pid in users:
            if pid in tree.pids:
                yield refuse(
                    f"System V {what} {ident}",
                    f"pid {pid}",
                    "objects of semget(2) and msgget(2) are not carried yet",
                    "use POSIX semaphores and queues",
                )
                break
