"""The keeper's side of deputies: one thread that traces them all, hears what reaches them, and imitates.

Signals come as reports (`reports`), without a stop. Tracing is for the rest: SIGSTOP; being stopped,
continued and killed so that the parent sees it; calls made on the program's behalf. A traced deputy that
nobody stops runs as any process does, and without its tracer (PTRACE_O_EXITKILL is not set) it goes on
collecting signals.

ptrace(2) answers only the thread that seized: commands of other threads are queued, `Future`s bring the
results.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, TypeVar

from godwit.errors import GodwitError, NoProcessError
from godwit.linux import ptrace, signalfd
from godwit.linux.ptrace import Stop
from godwit.residual import ending, scratch
from godwit.residual.deputy import Deputy, verify
from godwit.residual.ending import Kept
from godwit.residual.reports import Reports
from godwit.residual.waiting import number_of
from godwit.tracee.task import ALL_SIGNALS, Tracee
from godwit.types import OwnedFd, Pid, Tid

_CHUNK_BYTES: Final = 4096
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal came to the deputy and is to be delivered where the program runs."""

    number: int  # growing, with gaps, to be confirmed; 0: a SIGSTOP, which shows again: the deputy is stopped
    info: bytes  # siginfo_t, with ids as seen from home

    @property
    def signo(self) -> int:
        """Which signal."""
        return number_of(self.info)


@dataclass(frozen=True, slots=True)
class Stopped:
    """Job control has stopped the deputy; its parent has been told."""

    signal: int


@dataclass(frozen=True, slots=True)
class Continued:
    """The deputy runs again; its parent has been told. A SIGCONT from somebody else is reported as well."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The deputy is dead, and its keeper has forgotten it."""

    status: int  # as of waitpid(2)


Event = Signal | Stopped | Continued | Ended


class Keeper:
    """Traces deputies in the thread that calls `run`; all else may be called from any thread.

    It is made before any other thread of the process: SIGCHLD is read from a descriptor, and therefore
    blocked from then on in the calling thread and in those started later.
    """

    def __init__(self, tell: Callable[[Pid, Event], None]) -> None:
        """Prepare. `tell` is called in the keeper's thread and must not wait."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        self._tell = tell
        self._kept: dict[Pid, Kept] = {}
        self._by_fd: dict[int, Kept] = {}
        self._work: deque[Callable[[], None]] = deque()
        self._bell = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._deaths = signalfd.create(1 << (signal.SIGCHLD - 1))
        self._watch = select.epoll()
        self._watch.register(self._bell.number, select.EPOLLIN)
        self._watch.register(self._deaths.number, select.EPOLLIN)
        self._running = True

    def run(self) -> None:
        """Serve until `stop_running`. Afterwards every deputy is let go and waits for another keeper."""
        while self._running:
            for fd, _ in self._watch.poll():
                if fd == self._bell.number:
                    os.eventfd_read(fd)
                    while self._work:
                        self._work.popleft()()
                elif fd == self._deaths.number:
                    os.read(fd, _CHUNK_BYTES)
                    self._take_stops()
                elif fd in self._by_fd:
                    self._report(self._by_fd[fd])
        for kept in list(self._kept.values()):
            with contextlib.suppress(NoProcessError):
                self._halt(kept)
                kept.task.detach()
                self._forget(kept)

    def close(self) -> None:
        """Close the descriptors, once `run` has returned."""
        self._watch.close()
        self._bell.close()
        self._deaths.close()

    def ask(self, work: Callable[[], T]) -> Future[T]:
        """Have the keeper's thread do something; its result, or what it raises, comes by the future."""
        future: Future[T] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001  # raised where the result is waited for
                future.set_exception(error)

        self._work.append(do)
        os.eventfd_write(self._bell.number, 1)
        return future

    def stop_running(self) -> Future[None]:
        """Let `run` return."""
        return self.ask(lambda: setattr(self, "_running", False))

    def adopt(self, deputy: Deputy) -> Future[None]:
        """Take a deputy over, whoever had it before. What it has gathered is told at once.

        Raises (by the future):
            NoProcessError: It is not that deputy, or no more.
            BusyError: Another keeper or a debugger traces it.
        """
        return self.ask(lambda: self._adopt(deputy))

    def confirm(self, pid: Pid, number: int) -> Future[None]:
        """Tell that the signals up to this number have arrived: they will not be told again."""

        def do() -> None:
            # Of one that has ended nobody will be told again.
            if pid in self._kept:
                self._kept[pid].reports.confirm(number)

        return self.ask(do)

    def stop(self, pid: Pid, number: int) -> Future[None]:
        """Imitate that the program was stopped by a signal: SIGSTOP, SIGTSTP, SIGTTIN or SIGTTOU."""
        return self.ask(lambda: self._imitate_stop(self._known(pid), number))

    def cont(self, pid: Pid) -> Future[None]:
        """Imitate that the program continued."""
        return self.ask(lambda: ending.go_on(self._known(pid)))

    def exit(self, pid: Pid, code: int) -> Future[None]:
        """End the deputy as exit(3) would, with the low 8 bits of `code`."""
        return self.ask(lambda: self._exit(self._known(pid), code))

    def die(self, pid: Pid, number: int) -> Future[None]:
        """End the deputy by a signal. No core is dumped, nor said to have been."""
        return self.ask(lambda: self._die(self._known(pid), number))

    def call(self, pid: Pid, name: str, *args: int | bytes) -> Future[tuple[int, tuple[bytes, ...]]]:
        """Make a system call in the deputy, one that does not wait.

        Its result is told, and what the buffers hold then: bytes are passed by address. Raises (by the
        future) OSError as the call would, NoProcessError.
        """
        return self.ask(lambda: self._call(self._known(pid), name, *args))

    def close_fd(self, pid: Pid, fd: int) -> Future[None]:
        """Close a descriptor of the deputy: where the program runs it was closed."""
        return self.ask(lambda: self._close_fd(self._known(pid), fd))

    def _known(self, pid: Pid) -> Kept:
        if pid not in self._kept:
            raise NoProcessError(f"no deputy {pid} is kept here")
        return self._kept[pid]

    def _adopt(self, deputy: Deputy) -> None:
        gadgets = verify(deputy)
        reports = Reports.of(deputy)
        try:
            task = Tracee.seize(deputy.pid, Tid(deputy.pid))
        except GodwitError:
            reports.close()
            raise
        kept = Kept(deputy, task, reports, gadgets)
        self._kept[deputy.pid] = kept
        self._by_fd[kept.reports.fileno()] = kept
        self._watch.register(kept.reports.fileno(), select.EPOLLIN | select.EPOLLET)
        self._report(kept)
        # Whoever had it before may have died with a signal unblocked.
        ptrace.interrupt(task.tid)

    def _report(self, kept: Kept) -> None:
        while (report := kept.reports.next()) is not None:
            if not ending.is_ours(kept, report.info):
                self._tell(kept.deputy.pid, Signal(report.number, report.info))

    def _take_stops(self) -> None:
        while (found := ptrace.poll_any()) is not None:
            tid, stop = found
            if Pid(tid) in self._kept:
                self._take(self._kept[Pid(tid)], stop)

    def _take(self, kept: Kept, stop: Stop) -> None:
        """Answer a stop of a deputy, or its end."""
        if stop.exited:
            self._end(kept, stop.status)
        elif stop.event == ptrace.PTRACE_EVENT_STOP:
            self._note(kept, stop)
            if kept.stopped:
                ptrace.listen(kept.task.tid)
            else:
                ptrace.resume(kept.task.tid)
        elif stop.event == 0:
            self._at_signal(kept, stop.signal)
        else:
            ptrace.resume(kept.task.tid)

    def _at_signal(self, kept: Kept, number: int) -> None:
        if number == kept.imitated:
            kept.imitated = 0
        elif number == signal.SIGSTOP:
            # It was sent after all that has been reported by now.
            self._report(kept)
            self._tell(kept.deputy.pid, Signal(0, ptrace.get_siginfo(kept.task.tid)))
        else:
            # Blocked, it waits again and is reported.
            ptrace.set_signal_mask(kept.task.tid, ALL_SIGNALS)
        ptrace.resume(kept.task.tid, number)

    def _note(self, kept: Kept, stop: Stop) -> None:
        """Take in what a stop of job control, or the end of one, says."""
        ptrace.set_signal_mask(kept.task.tid, ALL_SIGNALS)
        before, kept.stopped = kept.stopped, stop.signal if stop.group_stopped else 0
        if kept.stopped and kept.stopped != before:
            self._tell(kept.deputy.pid, Stopped(kept.stopped))
        elif before and not kept.stopped:
            self._tell(kept.deputy.pid, Continued())

    def _end(self, kept: Kept, status: int) -> None:
        self._report(kept)
        self._forget(kept)
        self._tell(kept.deputy.pid, Ended(status))

    def _forget(self, kept: Kept) -> None:
        self._watch.unregister(kept.reports.fileno())
        del self._by_fd[kept.reports.fileno()], self._kept[kept.deputy.pid]
        kept.reports.close()

    def _halt(self, kept: Kept) -> None:
        """Stop a deputy where calls can be made in it, all signals blocked.

        Raises:
            NoProcessError: It ended, and that has been told.
        """
        with contextlib.suppress(ProcessLookupError):
            ptrace.interrupt(kept.task.tid)
        while True:
            stop = ptrace.wait_stop(kept.task.tid)
            if stop.event == ptrace.PTRACE_EVENT_STOP:
                self._note(kept, stop)
                break
            self._take(kept, stop)
            if stop.exited:
                raise NoProcessError(f"deputy {kept.deputy.pid} has ended")
        kept.task.save()
        # Whatever call it was about is made again: it was waiting, and has done nothing yet.
        kept.task.registers.restart_if_interrupted()

    def _imitate_stop(self, kept: Kept, number: int) -> None:
        ending.check_stops(number)
        if not kept.stopped:
            self._halt(kept)
            ending.be_stopped(kept, number)

    def _exit(self, kept: Kept, code: int) -> None:
        self._halt(kept)
        ending.begin_exit(kept, code)

    def _die(self, kept: Kept, number: int) -> None:
        ending.check_kills(number)
        self._halt(kept)
        ending.begin_death(kept, number)

    def _call(self, kept: Kept, name: str, *args: int | bytes) -> tuple[int, tuple[bytes, ...]]:
        self._halt(kept)
        try:
            return scratch.call(kept.task, kept.gadgets, name, *args)
        finally:
            ending.let_go(kept)

    def _close_fd(self, kept: Kept, fd: int) -> None:
        self._call(kept, "close", fd)
