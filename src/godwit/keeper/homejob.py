"""A job at home: its files are served, and its deputies stand for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from godwit.errors import GodwitError
from godwit.keeper.job import Job
from godwit.linux.pause import pause
from godwit.log import log
from godwit.procfs import status
from godwit.residual import control, keeping, signals
from godwit.residual.control import Confirmed, Continue, Ended, Halted, Killed, Over, Signalled
from godwit.residual.deputy import Deputy
from godwit.residual.homefiles.credentials import Credentials
from godwit.residual.homefiles.server import HomeFiles
from godwit.residual.keeping import JobEntry, Task
from godwit.residual.line import Pipe
from godwit.types import Pid
from godwit.wire.linkframes import Side

_AGAIN_S: Final = 0.05
_AGAIN_MOST_S: Final = 2.0

Connect = Callable[[str], Pipe]


class HomeJob(Job):
    """Made while the program still runs here. `connect` opens a connection for a link to a host."""

    role = keeping.HOME

    def __init__(
        self,
        job: bytes,
        pid: Pid,
        host: str,
        connect: Connect,
        keeper: signals.Keeper,
        over: Callable[[Job], None],
    ) -> None:
        super().__init__(job, Side.HOME, over)
        self.peer = host
        self._connect = connect
        self._keeper = keeper
        self._deputies: dict[int, Deputy] = {}  # by inner pid
        self._ended_there: set[int] = set()
        self._parked: set[int] = set()  # not yet seen stopped by what has parked them
        files = self.links[control.FILES_LINK]
        self._files = HomeFiles(
            f"/proc/{pid}/root",
            lambda parts: files.send(control.FILES, *map(bytes, parts)),
            allowed=credentials_of(pid),
        )

    def depart(self) -> None:
        """Connect both links. Raises GodwitError, OSError: the job is over then."""
        self.start(
            {
                control.FILES_LINK: {control.FILES: self._files.handle},
                control.CONTROL_LINK: {control.CONTROL: self._hear},
            }
        )
        try:
            for link in self.links.values():
                link.attach(self._connect(self.peer))
        except BaseException:
            self.end()
            raise

    def down(self, which: int, error: BaseException) -> None:
        """Connect again, for as long as it takes."""
        super().down(which, error)
        threading.Thread(target=self._connect_again, args=(which,), daemon=True).start()

    def _connect_again(self, which: int) -> None:
        link, wait_s = self.links[which], _AGAIN_S
        while not link.ended:
            try:
                link.attach(self._connect(self.peer))
            except (GodwitError, OSError) as error:
                log.debug("job %s: %s does not answer: %s", self.job.hex(), self.peer, error)
            else:
                return
            pause(wait_s)
            wait_s = min(wait_s * 2, _AGAIN_MOST_S)

    def deputize(self, deputies: tuple[tuple[int, Deputy], ...], *, parked: bool) -> None:
        """Keep the deputies: what reaches them is told to the host. Raises GodwitError.

        `parked`: they may be stopped, and not by job control.
        """
        for inner, deputy in deputies:
            self._deputies[inner] = deputy
            if parked:
                self._parked.add(inner)
        for deputy in self._deputies.values():
            self._keeper.adopt(deputy).result()

    def event(self, pid: Pid, event: signals.Event) -> bool:
        """Pass on what has happened to a deputy, if it is one of ours. Does not wait."""
        inner = next((inner for inner, deputy in self._deputies.items() if deputy.pid == pid), None)
        if inner is None:
            return False
        match event:
            case signals.Signal(number=number, info=info):
                self.tell(Signalled(inner=inner, number=number, info=info))
            case signals.Stopped() if inner in self._parked:
                self._parked.discard(inner)
                self._keeper.cont(pid)
            case signals.Continued():
                self.tell(Continue(inner=inner))
            case signals.Ended():
                self._deputy_ended(inner)
            case _:
                pass
        return True

    def _deputy_ended(self, inner: int) -> None:
        """One that was killed here takes its program along; one that ended after it has done its duty."""
        del self._deputies[inner]
        if inner not in self._ended_there:
            self.tell(Killed(inner=inner))

    def _hear(self, raw: memoryview) -> None:
        """Do what the host tells: called by the control link's reading thread."""
        message = control.unpack(raw)
        if isinstance(message, Over):
            threading.Thread(target=self.end, daemon=True).start()
        elif message is not None and (deputy := self._deputies.get(getattr(message, "inner", 0))) is not None:
            self._imitate(deputy.pid, message)

    def _imitate(self, pid: Pid, message: control.Message) -> None:
        match message:
            case Confirmed(number=number):
                self._keeper.confirm(pid, number)
            case Halted(signal=number):
                self._keeper.stop(pid, number)
            case Ended(inner=inner, status=status):
                self._ended_there.add(inner)
                if os.WIFSIGNALED(status):
                    self._keeper.die(pid, os.WTERMSIG(status))
                else:
                    self._keeper.exit(pid, os.WEXITSTATUS(status))
            case _:
                pass

    def release(self) -> None:
        """Let the files go. A deputy whose program is gone without a word is killed, as that was."""
        self._files.close()
        for deputy in self._deputies.values():
            self._keeper.die(deputy.pid, signal.SIGKILL)

    def entry(self) -> JobEntry:
        """Describe the job."""
        tasks = tuple(
            Task(pid=deputy.pid, starttime=deputy.starttime, inner=inner)
            for inner, deputy in self._deputies.items()
        )
        return replace(super().entry(), tasks=tasks)


def credentials_of(pid: Pid) -> Credentials:
    """Return as whom a process may act: all of its ids. Raises ProcessLookupError."""
    found = status.read(pid)
    return Credentials(
        uids=frozenset(found.uids),
        gids=frozenset(found.gids),
        groups=tuple(found.groups),
        builder=(found.uids[-1], found.gids[-1]),
    )
