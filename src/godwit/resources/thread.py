"""One thread: registers, extended state, signal stack, futex lists, scheduling. clone(2), ptrace(2)."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from godwit.errors import DestinationError, UnsupportedStateError
from godwit.linux import ptrace, sched
from godwit.linux.arch import UserRegs
from godwit.procfs import sched as proc_sched
from godwit.procfs import stat
from godwit.procfs.source import read_bytes
from godwit.resources import interrupted
from godwit.resources.interrupted import SleepEntry
from godwit.resources.sleepnotes import Note
from godwit.tracee.calls import Batch
from godwit.tracee.task import Tracee
from godwit.types import OwnedFd, Pid, Tid

PR_SET_PDEATHSIG: Final = 1
PR_GET_PDEATHSIG: Final = 2
PR_SET_NAME: Final = 15
PR_SET_TIMERSLACK: Final = 29
PR_GET_TIMERSLACK: Final = 30
PR_GET_TID_ADDRESS: Final = 40
_ALTSTACK: Final = struct.Struct("<QiiQ")
_SS_ONSTACK: Final = 1
_RSEQ_CS: Final = struct.Struct("<IIQQQ")
_XSTATE_BV_AT: Final = 512
_COMM_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RseqEntry:
    """Where restartable sequences are registered. rseq(2)."""

    address: int
    length_bytes: int
    signature: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadEntry:
    """A thread. `tid` is the process's own view; addresses are in its memory."""

    tid: int
    comm: bytes
    registers: bytes  # struct user_regs_struct
    xstate: bytes  # XSAVE layout of the source machine
    signal_mask: int
    pending: tuple[bytes, ...]  # siginfo_t, oldest first
    altstack: bytes  # stack_t
    clear_child_tid: int
    robust_list: tuple[int, int]  # address, length
    rseq: RseqEntry | None
    parent_death_signal: int
    timer_slack_ns: int
    scheduling: bytes  # struct sched_attr
    affinity: tuple[int, ...]
    all_cpus: bool  # it may run on every CPU of its machine
    io_priority: int
    sleep: SleepEntry | None = None


@dataclass(frozen=True, slots=True)
class Repose:
    """What the kernel told about a sleeping thread just before it was stopped."""

    stopped: bool  # by job control
    cpu: int
    wait_channel: str
    ran_ns: int | None  # when it last ran, on the scheduler's clock of `cpu`


def observe(pid: Pid, tid: Tid) -> Repose:
    """Look at a thread that is about to be stopped: the stop itself wipes this out."""
    state, cpu = stat.read_place(pid, tid)
    return Repose(
        stopped=state == "T",
        cpu=cpu,
        wait_channel=proc_sched.wchan(pid, tid),
        ran_ns=proc_sched.exec_start_ns(pid, tid),
    )


class SchedulerClocks:
    """The scheduler's clocks, one a CPU, against CLOCK_MONOTONIC.

    They leave out what interrupts and the hypervisor took, and so drift apart by tens of milliseconds.
    """

    def __init__(self) -> None:
        self._behind: dict[int, int] = {}

    def monotonic_ns(self, cpu: int, reading_ns: int) -> int:
        """Return when, on our CLOCK_MONOTONIC, the clock of `cpu` read `reading_ns`, not long ago."""
        if cpu not in self._behind:
            self._behind[cpu] = self._measure(cpu)
        return reading_ns + self._behind[cpu]

    def _measure(self, cpu: int) -> int:
        us = Pid(os.getpid())
        before = os.sched_getaffinity(0)
        try:
            # To be put on the CPU anew sets the reading.
            os.sched_setaffinity(0, {cpu})
            os.sched_yield()
            now_ns = time.monotonic_ns()
            reading_ns = proc_sched.exec_start_ns(us, Tid(us))
        finally:
            os.sched_setaffinity(0, before)
        return now_ns - reading_ns if reading_ns is not None else 0


@dataclass(frozen=True, slots=True)
class SleepClock:
    """When threads fell asleep, on the CLOCK_MONOTONIC of their process."""

    schedulers: SchedulerClocks
    shift_ns: int  # how far the process's CLOCK_MONOTONIC is ahead of ours
    notes: Mapping[int, Note]  # of the process, by its own tid

    def noted(self, tid: int, registers: UserRegs) -> Note | None:
        """Return the note about a sleep that was begun again, unless it is over."""
        note = self.notes.get(tid)
        if note is None or not interrupted.is_restarted(registers) or not note.matches(registers):
            return None
        return note if note.deadline_ns > time.monotonic_ns() + self.shift_ns else None

    def began_ns(self, repose: Repose) -> int:
        """Return when the thread fell asleep; now, where the kernel does not tell."""
        now_ns = time.monotonic_ns()
        began_ns = now_ns
        if repose.ran_ns is not None:
            began_ns = min(now_ns, self.schedulers.monotonic_ns(repose.cpu, repose.ran_ns))
        return began_ns + self.shift_ns


def collect(
    task: Tracee, inner_tid: int, batch: Batch, memory: OwnedFd, repose: Repose, clock: SleepClock
) -> Callable[[], ThreadEntry]:
    """Queue the questions for one stopped and saved thread.

    Args:
        task: The thread.
        inner_tid: Its id in its own pid namespace.
        batch: Of this very thread.
        memory: /proc/PID/mem of its process.
        repose: From `observe`.
        clock: When it fell asleep.
    """
    altstack = batch.space(_ALTSTACK.size)
    batch.add("sigaltstack", 0, altstack)
    tid_address = batch.space(8)
    batch.add("prctl", PR_GET_TID_ADDRESS, tid_address, 0, 0, 0)
    death_signal = batch.space(4)
    batch.add("prctl", PR_GET_PDEATHSIG, death_signal, 0, 0, 0)
    slack = batch.add("prctl", PR_GET_TIMERSLACK, 0, 0, 0, 0)
    registers = task.registers.copy()
    rseq = _collect_rseq(task)
    affinity = sched.get_affinity(task.tid)
    sleep = _collect_sleep(task, inner_tid, registers, memory, repose, clock)

    def answer() -> ThreadEntry:
        return ThreadEntry(
            tid=inner_tid,
            comm=read_bytes(task.pid, "comm", tid=task.tid).rstrip(b"\n"),
            registers=bytes(registers),
            xstate=ptrace.get_xstate(task.tid),
            signal_mask=task.signal_mask,
            pending=ptrace.peek_signals(task.tid, shared=False),
            altstack=batch.answer(altstack, _ALTSTACK.size),
            clear_child_tid=struct.unpack("<Q", batch.answer(tid_address, 8))[0],
            robust_list=ptrace.get_robust_list(task.tid),
            rseq=rseq,
            parent_death_signal=struct.unpack("<i", batch.answer(death_signal, 4))[0],
            timer_slack_ns=batch.results[slack],
            scheduling=sched.get_attributes(task.tid),
            affinity=affinity,
            all_cpus=len(affinity) >= (os.cpu_count() or 1),
            io_priority=sched.get_io_priority(task.tid),
            sleep=sleep,
        )

    return answer


def abort_critical_section(task: Tracee, memory: OwnedFd) -> bool:
    """Send a thread that was stopped inside a restartable sequence to its abort handler.

    The stop counts as a preemption. To be done before anything is injected: on its way to injected
    code the kernel forgets the section without aborting it. Returns whether the registers changed.
    """
    found = ptrace.get_rseq(task.tid)
    if not found.rseq_abi_pointer:
        return False
    section = struct.unpack("<Q", os.pread(memory.number, 8, int(found.rseq_abi_pointer) + 8))[0]
    if not section:
        return False
    _, _, start, length, abort = _RSEQ_CS.unpack(os.pread(memory.number, _RSEQ_CS.size, section))
    if not start <= task.registers.rip < start + length:
        return False
    task.registers.rip = abort
    return True


def _collect_rseq(task: Tracee) -> RseqEntry | None:
    found = ptrace.get_rseq(task.tid)
    if not found.rseq_abi_pointer:
        return None
    return RseqEntry(
        address=int(found.rseq_abi_pointer),
        length_bytes=int(found.rseq_abi_size),
        signature=int(found.signature),
    )


def _collect_sleep(
    task: Tracee, inner_tid: int, registers: UserRegs, memory: OwnedFd, repose: Repose, clock: SleepClock
) -> SleepEntry | None:
    if not interrupted.is_sleeping(registers):
        return None
    note = clock.noted(inner_tid, registers)
    if note is not None:
        return SleepEntry(call=note.call, arguments=registers.arguments, deadline_ns=note.deadline_ns)
    call = interrupted.call_of(registers, repose.wait_channel)
    if call is None:
        raise UnsupportedStateError(
            "a sleeping system call that cannot be begun again",
            where=f"thread {task.tid} of pid {task.pid}",
            why=f"it waits in {repose.wait_channel or 'an unknown place'}",
            remedy="try again in a moment",
        )
    arguments = registers.arguments
    pointer = interrupted.timeout_pointer(call, arguments)
    timespec = os.pread(memory.number, 16, pointer) if pointer else b""
    timeout_ns = interrupted.timeout_ns(call, arguments, timespec)
    deadline_ns = None if timeout_ns is None else clock.began_ns(repose) + timeout_ns
    return SleepEntry(call=call, arguments=arguments, deadline_ns=deadline_ns)


def restore_self(entry: ThreadEntry, batch: Batch) -> None:
    """Queue what a thread can only do for itself."""
    batch.add("set_robust_list", entry.robust_list[0], entry.robust_list[1])
    batch.add("set_tid_address", entry.clear_child_tid)
    stack, flags, _, size = _ALTSTACK.unpack(entry.altstack)
    batch.add("sigaltstack", _ALTSTACK.pack(stack, flags & ~_SS_ONSTACK, 0, size), 0)
    if entry.rseq is not None:
        batch.add("rseq", entry.rseq.address, entry.rseq.length_bytes, 0, entry.rseq.signature)
    batch.add("prctl", PR_SET_NAME, entry.comm[: _COMM_BYTES - 1] + b"\0", 0, 0, 0)
    batch.add("prctl", PR_SET_TIMERSLACK, entry.timer_slack_ns, 0, 0, 0)


def restore_parent_death_signal(entry: ThreadEntry, batch: Batch) -> None:
    """Queue the parent death signal: after the credentials, whose change clears it."""
    if entry.parent_death_signal:
        batch.add("prctl", PR_SET_PDEATHSIG, entry.parent_death_signal, 0, 0, 0)


def restore_scheduling(entry: ThreadEntry, tid: Tid) -> None:
    """Set policy, priority and CPUs from outside. `tid` is in our pid namespace."""
    every = range(os.cpu_count() or 1)
    wanted = set(every) if entry.all_cpus else set(entry.affinity) & set(every)
    if not wanted:
        raise DestinationError(
            f"thread {entry.tid} runs on CPUs {list(entry.affinity)} only, and there are {len(every)} here",
            remedy="choose a machine with as many CPUs, or widen its affinity (taskset -p)",
        )
    if os.sched_getaffinity(tid) != wanted:
        os.sched_setaffinity(tid, wanted)
    # After the CPUs: SCHED_DEADLINE wants them all.
    if sched.get_attributes(tid) != entry.scheduling:
        sched.set_attributes(tid, entry.scheduling)
    if sched.get_io_priority(tid) != entry.io_priority:
        sched.set_io_priority(tid, entry.io_priority)


def restore_registers(entry: ThreadEntry, task: Tracee, registers: bytes) -> None:
    """Give the thread its registers and its mask. Nothing may be injected afterwards.

    `registers` are the entry's own, but for a sleep that ended while it was begun again.
    """
    if ptrace.get_xstate(task.tid) != entry.xstate:
        ptrace.set_xstate(task.tid, entry.xstate)
    task.registers = UserRegs.from_buffer_copy(registers)
    task.signal_mask = entry.signal_mask
    task.replace_all()


def problem(entry: ThreadEntry) -> str:
    """Check a thread that came from outside; return what is wrong, or an empty string."""
    if len(entry.registers) != len(bytes(UserRegs())):
        return f"thread {entry.tid} has {len(entry.registers)} bytes of registers"
    if len(entry.xstate) < _XSTATE_BV_AT + 64:
        return f"thread {entry.tid} has {len(entry.xstate)} bytes of extended state"
    if len(entry.altstack) != _ALTSTACK.size or len(entry.scheduling) != 48:
        return f"thread {entry.tid} has a malformed signal stack or scheduling"
    if any(len(info) != ptrace.SIGINFO_BYTES for info in entry.pending):
        return f"thread {entry.tid} has a malformed waiting signal"
    return ""
