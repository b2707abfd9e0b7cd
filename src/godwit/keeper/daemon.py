"""The keeper's process: it answers questions on its socket, and traces the deputies in its first thread."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from pathlib import Path
from typing import Final, TypeVar

from godwit.errors import GodwitError, RequestError
from godwit.images import codec
from godwit.keeper.homejob import Connect, HomeJob
from godwit.keeper.hostjob import HostJob
from godwit.keeper.job import Job
from godwit.log import log
from godwit.migrate import transport
from godwit.residual import control, keeping, signals
from godwit.residual.keeping import (
    Answer,
    Arrived,
    Depart,
    Deputize,
    Drop,
    Envelope,
    Jobs,
    Pump,
    Question,
    Welcome,
)
from godwit.residual.line import Pipe, greet
from godwit.types import OwnedFd, Pid

_IDLE_S: Final = float(os.environ.get("GODWIT_KEEPER_IDLE_S", "10"))
Kind = TypeVar("Kind", HomeJob, HostJob)
_LOOK_S: Final = 0.5


class Daemon:
    """All jobs of this machine and user. `connect` opens a connection for a link."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._jobs: dict[bytes, Job] = {}
        self._lock = threading.Lock()
        self._keeper = signals.Keeper(self._event)
        self._used_at = time.monotonic()

    def run(self, listening: socket.socket) -> None:
        """Serve until nobody has asked, and there was no job, for a while."""
        threading.Thread(target=self._serve, args=(listening,), name="questions", daemon=True).start()
        self._keeper.run()

    def _event(self, pid: Pid, event: signals.Event) -> None:
        for job in list(self._jobs.values()):
            if isinstance(job, HomeJob) and job.event(pid, event):
                return

    def _serve(self, listening: socket.socket) -> None:
        listening.settimeout(_LOOK_S)
        while True:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                if not self._jobs and time.monotonic() - self._used_at > _IDLE_S:
                    break
                continue
            self._used_at = time.monotonic()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()
        # Who asks from now on finds nobody and starts another one.
        os.unlink(keeping.socket_path())
        self._keeper.stop_running()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            raw, fds = keeping.receive(connection)
            with contextlib.ExitStack() as held:
                for fd in fds:
                    held.enter_context(fd)
                connection.send(codec.encode(self._answer_to(raw, fds)))
        self._used_at = time.monotonic()

    def _answer_to(self, raw: bytes, fds: list[OwnedFd]) -> Answer:
        try:
            envelope = codec.decode(raw, Envelope)
            kind = keeping.QUESTIONS.get(envelope.kind)
            if kind is None:
                raise RequestError(f"this keeper does not know how to {envelope.kind}")
            return self._do(codec.decode(envelope.body, kind), fds)
        except GodwitError as error:
            return Answer(error=error.message, remedy=error.remedy)
        except OSError as error:
            return Answer(error=str(error))

    def _do(self, question: Question, fds: list[OwnedFd]) -> Answer:
        match question:
            case Depart(job=name, pid=pid, host=host):
                job = HomeJob(name, Pid(pid), host, self._connect, self._keeper, self._forget)
                self._add(job)
                job.depart()
            case Deputize(job=name, deputies=deputies, parked=parked):
                self._known(name, HomeJob).deputize(deputies, parked=parked)
            case Welcome(certs=certs):
                self._welcome(certs, fds)
            case Pump(job=name, connection=number):
                self._known(name, HostJob).pump(_only(fds), number)
            case Arrived(job=name, tasks=tasks):
                self._known(name, HostJob).arrived(tasks, _only(fds))
            case Drop(job=name):
                if (dropped := self._jobs.get(name)) is not None:
                    dropped.end()
            case Jobs():
                return Answer(jobs=tuple(job.entry() for job in self._jobs.values()))
        return Answer()

    def _add(self, job: Job) -> None:
        with self._lock:
            if job.job in self._jobs:
                raise RequestError(f"there is a job {job.job.hex()} already")
            self._jobs[job.job] = job

    def _forget(self, job: Job) -> None:
        with self._lock:
            if self._jobs.get(job.job) is job:
                del self._jobs[job.job]
        self._used_at = time.monotonic()

    def _known(self, name: bytes, kind: type[Kind]) -> Kind:
        job = self._jobs.get(name)
        if not isinstance(job, kind):
            raise RequestError(f"there is no job {name.hex()} here")
        return job

    def _welcome(self, certs: str, fds: list[OwnedFd]) -> None:
        """Take a connection from a home; the job it is for is new, or has lost one."""
        pipe = _pipe_of(certs, fds)
        try:
            heard = greet(pipe)
        except BaseException:
            pipe.close()
            raise
        name, which = heard.job[: control.JOB_BYTES] + b"\0", heard.job[control.JOB_BYTES]
        with self._lock:
            job = self._jobs.get(name)
            if job is None:
                job = self._jobs[name] = HostJob(name, self._forget)
        link = job.links.get(which)
        if link is None or not isinstance(job, HostJob):
            pipe.close()
            raise RequestError("a connection for a link that is not there")
        link.attach(pipe, heard)


def _pipe_of(certs: str, fds: list[OwnedFd]) -> Pipe:
    connection = socket.socket(fileno=_only(fds).detach())
    return transport.link_over(connection, Path(certs) if certs else None)


def _only(fds: list[OwnedFd]) -> OwnedFd:
    if len(fds) != 1:
        raise RequestError(f"{len(fds)} descriptors came, not one")
    return fds[0].release()


def serve(connect: Connect) -> None:
    """Be the keeper of this user, unless there is one.

    Raises:
        OSError: Its socket cannot be made.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    keeping.directory()
    path = keeping.socket_path()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), keeping.reach():
            log.info("there is a keeper already")
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listening.bind(path)
        listening.listen(64)
        Daemon(connect).run(listening)
