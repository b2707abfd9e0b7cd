"""One thread under trace.

ptrace(2) binds a tracee to the OS thread that seized it, so a `Tracee` must stay in one thread.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Final

from godwit.errors import AccessError, BusyError, InternalError, NoProcessError
from godwit.linux import ptrace
from godwit.linux.arch import UserRegs
from godwit.procfs import status as proc_status
from godwit.types import Pid, Tid

ALL_SIGNALS: Final = 0xFFFFFFFFFFFFFFFF
_SHOWS_WITHIN_S: Final = 0.02


class Tracee:
    """A seized thread. From `save` on, injected code may run in it until `restore`."""

    def __init__(self, pid: Pid, tid: Tid) -> None:
        self.pid = pid
        self.tid = tid
        self.group_stopped = False
        self.seen_stopped = False
        """Job control had stopped it when it was seized, so it was not interrupted."""
        self.registers = UserRegs()
        """The registers to run on with: as found, but for what `interrupted` corrected."""
        self.signal_mask = 0
        self._entered = False
        self._mask: int | None = None
        self._held_signals: list[int] = []

    @classmethod
    def seize(cls, pid: Pid, tid: Tid, options: int = 0) -> Tracee:
        """Become the tracer of a thread; it goes on running.

        Raises:
            NoProcessError: It is gone.
            BusyError: Somebody else traces it.
            AccessError: We may not.
        """
        try:
            ptrace.seize(tid, options)
        except ProcessLookupError as error:
            raise NoProcessError(f"thread {tid} of pid {pid} is gone") from error
        except PermissionError as error:
            raise _seize_error(pid, tid) from error
        return cls(pid, tid)

    def wait_until_stopped(self, deadline: float = math.inf) -> None:
        """Return once the thread is stopped by our interrupt or by job control.

        Signals that arrive first are delivered, as they would have been.

        Args:
            deadline: On time.monotonic. A thread may wait in the kernel where nothing stops it: for the
                child of its vfork(2), or for a dead file server.

        Raises:
            NoProcessError: It ended instead.
            BusyError: It did not stop in time. It will yet; see `let_go_when_stopped`.
        """
        while True:
            stop = self._wait(deadline)
            if stop is None:
                raise BusyError(
                    f"thread {self.tid} of pid {self.pid} waits in the kernel and cannot be stopped now",
                    remedy="try again in a moment",
                )
            if stop.exited:
                raise NoProcessError(f"thread {self.tid} of pid {self.pid} ended while being stopped")
            if stop.event == ptrace.PTRACE_EVENT_STOP:
                self.group_stopped = stop.group_stopped
                return
            ptrace.resume(self.tid, 0 if stop.event else stop.signal)

    def _wait(self, deadline: float) -> ptrace.Stop | None:
        try:
            if deadline == math.inf:
                return ptrace.wait_stop(self.tid)
            while (stop := ptrace.poll_stop(self.tid)) is None:
                if time.monotonic() > deadline:
                    return None
                # We may share the thread's CPU: yielding is what lets it come to its stop.
                os.sched_yield()
            return stop
        except ChildProcessError as error:
            # Another thread of its process has executed a program, and taken its id.
            raise NoProcessError(f"thread {self.tid} of pid {self.pid} is gone") from error

    def let_go_when_stopped(self, deadline: float) -> None:
        """Detach a thread that did not stop in time, once it does; if it never does, our end will."""
        with contextlib.suppress(BusyError, NoProcessError, ProcessLookupError):
            self.wait_until_stopped(deadline)
            ptrace.detach(self.tid)

    def wait_until_gone(self) -> None:
        """Return once the killed thread is gone. Of a process, wait for the leader last."""
        with contextlib.suppress(ChildProcessError):
            while not ptrace.wait_stop(self.tid).exited:
                pass

    def save(self) -> None:
        """Note registers and mask. Nothing is changed."""
        self.registers = ptrace.get_registers(self.tid)
        self.signal_mask = ptrace.get_signal_mask(self.tid)

    def restore(self) -> None:
        """Put registers and mask back, if injected code has run since `save`.

        The mask first: should we die in between, the injected code's own way back restores both.
        """
        if self._entered:
            ptrace.set_signal_mask(self.tid, self.signal_mask)
            ptrace.set_registers(self.tid, self.registers)
            self._entered = False
            self._mask = None
            # A stop that came while injected code ran waits for the thread again: `park` relies on it.
            held, self._held_signals = self._held_signals, []
            for number in held:
                ptrace.kill_thread(self.pid, self.tid, number)

    def replace_all(self) -> None:
        """Give the thread the registers and the mask that stand in this object."""
        self._entered = True
        self.restore()

    def enter(self, registers: UserRegs, trap_signal: int) -> None:
        """Set the registers to injected code, with every signal blocked but the one it traps with."""
        self._aim(registers, ALL_SIGNALS & ~(1 << (trap_signal - 1)))

    def _aim(self, registers: UserRegs, mask: int) -> None:
        ptrace.set_registers(self.tid, registers)
        if self._mask != mask:
            self._entered = True
            ptrace.set_signal_mask(self.tid, mask)
            self._mask = mask

    def run_until_trap(self, trap_signal: int, trap_address: int) -> list[Tid]:
        """Run the entered code until it signals itself at its trap; return the tasks it made.

        Raises:
            NoProcessError: The task died on the way.
        """
        return self._run(ptrace.resume, lambda stop: self._at_trap(stop, trap_signal, trap_address))

    def run_until_executed(self, trap_signal: int, trap_address: int, others: Iterable[Tracee]) -> bool:
        """Run the entered code until it has executed another program; it is saved at its first instruction.

        Return False where it came to its trap instead.

        Args:
            trap_signal: As of `run_until_trap`.
            trap_address: As of `run_until_trap`.
            others: All other threads of its process, ours too: it waits until we have noticed their deaths.

        Raises:
            NoProcessError: The task died on the way.
        """
        ptrace.set_options(self.tid, ptrace.PTRACE_O_TRACEEXEC)
        ptrace.resume(self.tid)
        while True:
            stop = self._wait(time.monotonic())
            if stop is None:
                for each in others:
                    each._notice_death()
                os.sched_yield()
                continue
            if stop.exited:
                raise NoProcessError(f"thread {self.tid} of pid {self.pid} died while executing a program")
            if stop.event == ptrace.PTRACE_EVENT_EXEC:
                # Inside execve(2) still: its result would overwrite a register of ours.
                self._run(ptrace.resume_to_call, lambda stop: stop.signal == signal.SIGTRAP)
                self._entered, self._mask = False, None
                self.save()
                return True
            if stop.event == 0:
                if self._at_trap(stop, trap_signal, trap_address):
                    return False
                self._held_signals.append(stop.signal)
            ptrace.resume(self.tid)

    def run_until_call(self, number: int) -> None:
        """Let the thread itself run until it enters the system call; leave it there, not saved.

        Raises:
            NoProcessError: The task died on the way.
        """
        while True:
            self._run(ptrace.resume_to_call, lambda stop: stop.signal == signal.SIGTRAP)
            if ptrace.get_registers(self.tid).call_number == number:
                break
        self._entered = bool(self._held_signals)
        self.save()

    def make_call(self, registers: UserRegs) -> None:
        """Make the one system call that the registers are aimed at, and stop at its exit.

        Not by single steps: the processor's trace flag would outlive a tracer that dies.

        Raises:
            NoProcessError: The task died on the way.
        """
        self._aim(registers, ALL_SIGNALS)
        for _ in ("entry", "exit"):
            self._run(ptrace.resume_to_call, lambda stop: stop.signal == signal.SIGTRAP)

    def _at_trap(self, stop: ptrace.Stop, trap_signal: int, trap_address: int) -> bool:
        return stop.signal == trap_signal and (
            ptrace.get_registers(self.tid).instruction_pointer == trap_address
        )

    def _run(self, resume: Callable[[Tid], None], at_end: Callable[[ptrace.Stop], bool]) -> list[Tid]:
        born: list[Tid] = []
        resume(self.tid)
        while True:
            stop = ptrace.wait_stop(self.tid)
            if stop.exited:
                raise NoProcessError(f"thread {self.tid} of pid {self.pid} died while frozen")
            if stop.event in (ptrace.PTRACE_EVENT_FORK, ptrace.PTRACE_EVENT_VFORK, ptrace.PTRACE_EVENT_CLONE):
                born.append(Tid(ptrace.event_message(self.tid)))
            elif stop.event == 0:
                if at_end(stop):
                    return born
                # What passes the mask from outside is raised again when the task is let go.
                self._held_signals.append(stop.signal)
            elif stop.event != ptrace.PTRACE_EVENT_STOP:
                raise InternalError(f"thread {self.tid}: unexpected ptrace event {stop.event}")
            resume(self.tid)

    def detach(self) -> None:
        """Restore what `save` noted and let the thread go. A thread that is gone is no error."""
        with contextlib.suppress(ProcessLookupError):
            self.restore()
            ptrace.detach(self.tid)

    def park(self) -> None:
        """Make sure that the stopped thread stays stopped even if its tracer dies.

        A SIGSTOP of its own waits for the thread: whoever ends the trace, the kernel delivers it
        before the thread's next instruction. `unpark` takes it back unseen.
        """
        ptrace.kill_thread(self.pid, self.tid, signal.SIGSTOP)

    def unpark(self, others: Iterable[Tracee]) -> None:
        """Take the SIGSTOP of `park` back; the thread is stopped at its delivery afterwards.

        Other signals that were waiting are delivered on the way, in the kernel's own order.

        Args:
            others: Threads of its process that we hold. Somebody may kill it now, and the death of a leader
                shows only when that of all others has been noticed.

        Raises:
            NoProcessError: It has ended.
        """
        try:
            ptrace.resume(self.tid)
        except ProcessLookupError as error:
            raise NoProcessError(f"thread {self.tid} of pid {self.pid} ended while parked") from error
        while True:
            stop = self._wait(time.monotonic() + _SHOWS_WITHIN_S)
            if stop is None:
                for each in others:
                    each._notice_death()
                continue
            if stop.exited:
                raise NoProcessError(f"thread {self.tid} of pid {self.pid} ended while parked")
            if stop.event == 0 and stop.signal == signal.SIGSTOP:
                return
            ptrace.resume(self.tid, 0 if stop.event else stop.signal)

    def _notice_death(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.tid, os.WEXITED | os.WNOHANG)


def _seize_error(pid: Pid, tid: Tid) -> AccessError | BusyError | NoProcessError:
    try:
        found = proc_status.read(pid, tid)
    except ProcessLookupError:
        return NoProcessError(f"thread {tid} of pid {pid} is gone")
    if found.state in "ZX" or not found.vm_size_bytes:
        return NoProcessError(f"thread {tid} of pid {pid} is ending")
    tracer = found.tracer_pid
    if tracer:
        return BusyError(
            f"pid {pid} is already traced by pid {tracer}",
            remedy="end the debugger or tracer first",
        )
    if os.geteuid() == 0:
        # It is executing a program just now, and its memory is neither the old one nor the new.
        return BusyError(f"pid {pid} cannot be traced at this moment", remedy="try again in a moment")
    return AccessError(
        f"may not trace pid {pid}", remedy="run as root, or as the process's own user with ptrace allowed"
    )
