"""A job at its host: the kernel's questions about files go home, and what happens to it is told there."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from godwit.keeper.job import Job
from godwit.linux import fuse, pidfd
from godwit.log import log
from godwit.procfs import stat
from godwit.residual import control, keeping
from godwit.residual.control import Confirmed, Continue, Ended, Killed, Over, Signalled
from godwit.residual.homefiles.pump import Pump
from godwit.residual.keeping import JobEntry, Task
from godwit.residual.waiting import code_of, number_of
from godwit.types import OwnedFd, Pid
from godwit.wire.linkframes import Side

_EXPECTED_S: Final = 30.0
_END: Final = struct.Struct("<Ii")
_QUEUED: Final = frozenset({-1, -2, -3, -4})  # SI_QUEUE, SI_TIMER, SI_MESGQ, SI_ASYNCIO: they carry a value


class HostJob(Job):
    """Made when home connects. The program arrives later, or never."""

    role = keeping.HOST

    def __init__(self, job: bytes, over: Callable[[Job], None]) -> None:
        super().__init__(job, Side.HOST, over)
        self._pump: Pump | None = None
        self._mounting = threading.Lock()
        self._tasks: dict[int, Task] = {}  # by inner pid
        self.start(
            {
                control.FILES_LINK: {control.FILES: self._deliver},
                control.CONTROL_LINK: {control.CONTROL: self._hear},
            }
        )

    def pump(self, device: OwnedFd, connection: int) -> None:
        """Carry the messages of the job's file system from now on."""
        link = self.links[control.FILES_LINK]
        with self._mounting:
            self._pump = Pump(
                fuse.Connection(device, connection), lambda message: link.send(control.FILES, bytes(message))
            )

    def _deliver(self, message: memoryview) -> None:
        with self._mounting:
            # Its thread asks, and home may answer, before there is a name for it.
            pump = self._pump
        if pump is not None:
            pump.deliver([message])

    def arrived(self, tasks: tuple[Task, ...], ends: OwnedFd) -> None:
        """Watch over the processes of the job, which run now."""
        self._tasks = {task.inner: task for task in tasks}
        threading.Thread(target=self._watch, args=(ends,), name="ends", daemon=True).start()

    def _watch(self, ends: OwnedFd) -> None:
        """Tell home of every end that the pod's init tells, and of the job's when the pod is gone."""
        with ends:
            while len(raw := os.read(ends.number, _END.size)) == _END.size:
                inner, status = _END.unpack(raw)
                log.debug("job %s: process %d ended with status %#x", self.job.hex(), inner, status)
                self.tell(Ended(inner=inner, status=status))
        self.end()

    def down(self, which: int, error: BaseException) -> None:
        """Wait for home to connect again; but not for ever if nothing of the job has arrived."""
        super().down(which, error)
        if not self._tasks:
            timer = threading.Timer(_EXPECTED_S, self._end_if_forgotten)
            timer.daemon = True
            timer.start()

    def _end_if_forgotten(self) -> None:
        if not self._tasks and not all(link.up for link in self.links.values()):
            self.end()

    def _hear(self, raw: memoryview) -> None:
        """Do what home tells: called by the control link's reading thread."""
        message = control.unpack(raw)
        match message:
            case Signalled(inner=inner, number=number, info=info):
                self._signal(inner, number_of(info), info)
                if number:
                    self.tell(Confirmed(inner=inner, number=number))
            case Continue(inner=inner):
                self._signal(inner, signal.SIGCONT, b"")
            case Killed(inner=inner):
                self._signal(inner, signal.SIGKILL, b"")
            case Over():
                threading.Thread(target=self.end, daemon=True).start()
            case _:
                pass

    def _signal(self, inner: int, number: int, info: bytes) -> None:
        """Send a signal, with the value that came with it, to one process of the job if it still lives."""
        task = self._tasks.get(inner)
        if task is None:
            return
        with contextlib.suppress(ProcessLookupError), pidfd.pidfd_open(Pid(task.pid)) as held:
            if stat.read(Pid(task.pid)).starttime != task.starttime:
                return
            if info and code_of(info) in _QUEUED:
                pidfd.queue_signal(held.number, number, info)
            else:
                pidfd.send_signal(held.number, number)

    def release(self) -> None:
        """Whoever still waits for a file gets an error; the processes are no longer ours to reach."""
        if self._pump is not None:
            self._pump.close()

    def entry(self) -> JobEntry:
        """Describe the job."""
        return replace(super().entry(), tasks=tuple(self._tasks.values()))
