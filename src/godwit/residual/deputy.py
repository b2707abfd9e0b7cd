"""The deputy: the task of a process that has left, turned in place into one that waits for signals.

It keeps what belongs to a task or its descriptors: pid, parent, children, group, session, terminal, limits,
descriptors, locks, and how it looks in ps(1). Its memory is gone. All signals are blocked in it, and it takes
them by rt_sigtimedwait(2), so none has its default action, also while no keeper is there. It numbers each and
writes it to a socket whose other end it holds too, where the keeper of the day finds it: see decision 0012.

execve(2) resets what cannot be kept: the signal that tells the parent of the end is SIGCHLD, saved ids are
the effective ones, /proc/PID/exe shows the deputy's own file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import os
import resource
import secrets
import signal
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from godwit.errors import InternalError, NoProcessError, Refusal, UnsupportedStateError
from godwit.linux import elf
from godwit.linux.arch import DEPUTY_CALLS_AT, NR, TRAP_AT, WAY_BACK_AT, deputy
from godwit.procfs import limits, source, stat, status, tasks
from godwit.residual import rest, scratch, standing, waiting
from godwit.tracee import calls
from godwit.tracee.calls import Workshop
from godwit.tracee.gadgets import Gadgets
from godwit.tracee.task import Tracee
from godwit.types import Pid, RemoteAddr, Tid

COOKIE_BYTES: Final = 16
_NAME: Final = "godwit-deputy"
_EXE: Final = f"/memfd:{_NAME} (deleted)"
_PROGRAM_LIMIT_BYTES: Final = 4096
_TRAILER: Final = struct.Struct(f"<ii{COOKIE_BYTES}s")  # of its program: reports, writer, cookie
_DESCRIPTORS: Final = 3
_MEMFD_NOEXEC: Final = "/proc/sys/vm/memfd_noexec"
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2
_F_ADD_SEALS: Final = 1033
_SEALS: Final = 0xF  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE
_AT_EMPTY_PATH: Final = 0x1000
_ROBUST_LIST_HEAD_BYTES: Final = 24
_KERNEL_SIGACTION: Final = struct.Struct("<QQQQ")
_SIGNAL_SET_BYTES: Final = 8
_POINTER: Final = struct.Struct("<Q")
_HIGHEST_SIGNAL: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Deputy:
    """Which task it is, and how to reach it: enough for a keeper that has never seen it."""

    pid: Pid
    starttime: int  # clock ticks since boot, as /proc/PID/stat has it
    boot_id: str
    cookie: bytes  # ends its program; nobody else knows it
    reports: int  # its descriptor from which the keeper reads what it reports
    writer: int  # its descriptor for the other end
    close_on_exec: tuple[int, ...] = ()  # descriptors that had FD_CLOEXEC; none has now


def obstacles(pid: Pid) -> list[Refusal]:
    """Return what would keep a process from becoming a deputy: to be asked before it may leave."""
    found: list[Refusal] = []

    def refuse(what: str, why: str, remedy: str = "") -> None:
        found.append(Refusal(what=what, where=f"pid {pid}", why=why, remedy=remedy))

    limit = limits.read(pid)[resource.RLIMIT_NOFILE][0]
    if sum(fd < limit for fd in tasks.open_fds(pid)) + _DESCRIPTORS > limit:
        why = "its deputy needs 3 descriptors more than it has"
        refuse("its limit of open files", why, "raise it (prlimit --nofile)")
    if stat.read(pid, Tid(pid)).state in "ZX":
        refuse("a first thread that has ended", "execve(2) keeps the pid of that thread only")
    with contextlib.suppress(FileNotFoundError), open(_MEMFD_NOEXEC, encoding="ascii") as file:
        if file.read().strip() == "2":
            refuse("vm.memfd_noexec is 2", "its deputy is a program in a memfd", "set it to 1 or 0")
    return found


def new_cookie() -> bytes:
    """Return a secret for one deputy."""
    return secrets.token_bytes(COOKIE_BYTES)


def become(threads: Sequence[Tracee], cookie: bytes, *, carried: Iterable[bytes] = ()) -> Deputy:
    """Turn a process that has left into its deputy. It is detached from, and waits for signals.

    If all threads were parked, no code of the program runs, whenever we die on the way: it is the deputy
    then, and `find` finds it, or is stopped or at rest, and another call can turn it. FD_CLOEXEC may have
    been cleared already.

    Args:
        threads: All of the process, leader first, stopped by us; after a commit, parked. Nobody needs
            the content of its memory any more.
        cookie: From `new_cookie`, and written down for whoever comes after us.
        carried: The siginfo_t of signals that went along: they are dropped here.

    Raises:
        UnsupportedStateError: No descriptor or memory for it, or the kernel executes no memfd. It is at rest.
        NoProcessError: It was killed.
    """
    leader = threads[0]
    gadgets = rest.put_to_rest(threads)
    comm = source.read_bytes(leader.pid, "comm").removesuffix(b"\n")
    with contextlib.closing(calls.map_workshop(leader, frames=True, gadgets=gadgets)) as workshop:
        for task in threads:
            _forget_threads_memory(task, workshop)
        close_on_exec = _prepare(leader, workshop)
        waiting.drop_carried(workshop, threads, carried)
        reports, writer, program_fd = _open(leader, workshop)
        _write_program(leader, workshop, program_fd, _program(comm, reports, writer, cookie))
        before = standing.before_exec(leader.pid, functools.partial(workshop.call, leader))
        _execute(threads, workshop, program_fd)
    known = dataclasses.replace(find(leader.pid, cookie), close_on_exec=close_on_exec)
    standing.after_exec(leader.pid, before, functools.partial(scratch.call, leader, verify(known)))
    # It has its name by then, even if job control holds it stopped.
    leader.run_until_call(NR["rt_sigtimedwait"])
    leader.detach()
    return known


def _program(comm: bytes, reports: int, writer: int, cookie: bytes) -> bytes:
    code = deputy(writer, comm) + _TRAILER.pack(reports, writer, cookie)
    return elf.static_executable(code, scratch_bytes=scratch.SCRATCH_BYTES)


def read_boot_id() -> str:
    """Return the random id of this machine's boot."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


def find(pid: Pid, cookie: bytes) -> Deputy:
    """Return what there is to know of a deputy, but for `close_on_exec`.

    Raises:
        NoProcessError: The process is gone, or no deputy with that cookie.
    """
    program = _read_program(pid)
    reports, writer, its = _TRAILER.unpack(program[-_TRAILER.size :])
    if not secrets.compare_digest(its, cookie):
        raise NoProcessError(f"pid {pid} is another deputy")
    return Deputy(
        pid=pid,
        starttime=stat.read(pid).starttime,
        boot_id=read_boot_id(),
        cookie=cookie,
        reports=reports,
        writer=writer,
    )


def verify(known: Deputy) -> Gadgets:
    """Check that a task is the deputy known as such; return where calls can be made in it.

    Raises:
        NoProcessError: It is not, or no more.
    """
    its = dataclasses.replace(find(known.pid, known.cookie), close_on_exec=known.close_on_exec)
    if its != known:
        raise NoProcessError(f"pid {known.pid} is another deputy")
    at = elf.entry_point(_read_program(known.pid)) + DEPUTY_CALLS_AT
    return Gadgets(at, at + WAY_BACK_AT)


def _read_program(pid: Pid) -> bytes:
    try:
        with open(f"/proc/{pid}/exe", "rb", buffering=0) as file:
            link, program = os.readlink(f"/proc/{pid}/exe"), file.read(_PROGRAM_LIMIT_BYTES)
    except OSError as error:
        raise NoProcessError(f"deputy {pid} is gone") from error
    if link != _EXE or len(program) < _TRAILER.size:
        raise NoProcessError(f"pid {pid} is no deputy")
    return program


def _forget_threads_memory(task: Tracee, workshop: Workshop) -> None:
    """Keep the thread's end out of shared memory: robust futexes would be marked as left by a dead owner."""
    calls.single_call(task, workshop.gadgets, workshop.memory, "set_robust_list", 0, _ROBUST_LIST_HEAD_BYTES)
    calls.single_call(task, workshop.gadgets, workshop.memory, "set_tid_address", 0)


def _prepare(leader: Tracee, workshop: Workshop) -> tuple[int, ...]:
    """Take from the process what would act at home, and let execve(2) close nothing and ignore nothing.

    Returns the descriptors that had FD_CLOEXEC.
    """
    close_on_exec = tuple(fd for fd in sorted(tasks.open_fds(leader.pid)) if _closes_on_exec(leader.pid, fd))
    batch = workshop.batch(leader)
    for timer in range(3):  # ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF
        batch.add("setitimer", timer, bytes(32), 0)
    ignored = status.read(leader.pid).sig_ign
    # Caught, not default: to ask for the default would throw away what waits and is ignored by default.
    caught = batch.data(_KERNEL_SIGACTION.pack(workshop.gadgets.call, 0, 0, 0))
    for number in range(1, _HIGHEST_SIGNAL + 1):
        if ignored >> (number - 1) & 1 and number not in (signal.SIGKILL, signal.SIGSTOP):
            batch.add("rt_sigaction", number, caught, 0, _SIGNAL_SET_BYTES)
    for fd in close_on_exec:
        batch.make_room()
        batch.add("fcntl", fd, fcntl.F_SETFD, 0)
    batch.run()
    return close_on_exec


def _closes_on_exec(pid: Pid, fd: int) -> bool:
    for line in source.read_text(pid, f"fdinfo/{fd}").splitlines():
        key, _, value = line.partition(":")
        if key == "flags":
            return bool(int(value, 8) & os.O_CLOEXEC)
    raise InternalError(f"pid {pid}: fdinfo of {fd} has no flags")


def _open(leader: Tracee, workshop: Workshop) -> tuple[int, int, int]:
    """Make the pair of sockets and the file for the program; return their descriptors there."""
    batch = workshop.batch(leader)
    pair = batch.space(8)
    batch.add("socketpair", socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, pair)
    file = batch.add("memfd_create", _NAME.encode() + b"\0", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    try:
        number = batch.run()[file]
    except OSError as error:
        raise UnsupportedStateError(
            "3 more descriptors",
            where=f"pid {leader.pid}",
            why=str(error.strerror),
            remedy="raise its limit of open files (prlimit --nofile)",
        ) from error
    reports, writer = struct.unpack("<ii", batch.answer(pair, 8))
    return reports, writer, number


def _write_program(leader: Tracee, workshop: Workshop, fd: int, program: bytes) -> None:
    batch = workshop.batch(leader)
    written = batch.add("pwrite64", fd, program, len(program), 0)
    batch.add("fcntl", fd, _F_ADD_SEALS, _SEALS)
    if batch.run()[written] != len(program):
        raise InternalError(f"pid {leader.pid}: the program was written in part")


def _execute(threads: Sequence[Tracee], workshop: Workshop, fd: int) -> None:
    """Have the leader execute the program; return at its first instruction, with the other threads gone."""
    leader, *others = threads
    arguments, environment = _strings(leader.pid)
    table = b"".join(_POINTER.pack(address) for address in (*arguments, 0, *environment, 0))
    batch = workshop.batch(leader)
    at = _place(leader, workshop, table)
    batch.add("execveat", fd, b"\0", at, at + _POINTER.size * (len(arguments) + 1), _AT_EMPTY_PATH)
    batch.enter()
    if leader.run_until_executed(workshop.trap_signal, workshop.address + TRAP_AT, others):
        return
    try:
        batch.collect()
    except OSError as error:
        raise UnsupportedStateError(
            "another program in its place",
            where=f"pid {leader.pid}",
            why=str(error),
            remedy="see sysctl vm.memfd_noexec, and its limits",
        ) from error
    raise InternalError(f"execveat in pid {leader.pid} returned")


def _place(leader: Tracee, workshop: Workshop, content: bytes) -> RemoteAddr:
    """Put bytes into fresh memory of the process, as many as they are."""
    at = workshop.call(leader, "mmap", 0, len(content), 3, 0x22, -1, 0)
    os.pwrite(workshop.memory.number, content, at)
    return RemoteAddr(at)


def _strings(pid: Pid) -> tuple[list[int], list[int]]:
    """Return the addresses of the arguments and of the environment, as /proc shows them now.

    What the program has written over its arguments (setproctitle) stays.
    """
    place = stat.read(pid)
    found: list[list[int]] = []
    for start, end, name in (
        (place.arg_start, place.arg_end, "cmdline"),
        (place.env_start, place.env_end, "environ"),
    ):
        content = source.read_bytes(pid, name)[: end - start]
        starts: list[int] = []
        at = 0
        while at < len(content):
            starts.append(start + at)
            at = content.find(b"\0", at) + 1 or len(content)
        found.append(starts)
    return found[0], found[1]
