"""Asking the keeper of this machine: one process of Godwit, which serves the ties of all jobs.

It listens on a local socket in a directory that only its user may enter, is started by who first needs it,
and ends by itself when it has had no job for a while. A question and an answer are one message each.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from godwit.errors import AccessError, GodwitError, InternalError
from godwit.images import codec
from godwit.linux.pause import pause
from godwit.residual.deputy import Deputy
from godwit.types import OwnedFd, Pid

MESSAGE_LIMIT_BYTES: Final = 64 << 10
_FDS_LIMIT: Final = 4
HOME: Final = "home"
HOST: Final = "host"
_STARTS_WITHIN_S: Final = 10.0
_ANSWERS_WITHIN_S: Final = 60.0
_AGAIN_S: Final = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A process that cannot be mistaken for a later one of its number."""

    pid: int  # as this machine sees it
    starttime: int  # clock ticks since boot
    inner: int  # the pid by which the job knows it


@dataclass(frozen=True, slots=True, kw_only=True)
class Depart:
    """Home: connect to a host, and answer for the files of a job that is about to leave for it."""

    job: bytes
    pid: int  # of the root: whose files, and as whom
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deputize:
    """Home: the job has left, and its tasks are deputies."""

    job: bytes
    deputies: tuple[tuple[int, Deputy], ...]  # with the pid by which the job knows each
    parked: bool = False  # who made them found them stopped: they are to go on


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Either: the job does not come, or is over. Nothing of it is to stay. It need not be known."""

    job: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Host: the descriptors are those of a connection from a home. It is proved with these certificates."""

    certs: str  # empty: it proved itself before


@dataclass(frozen=True, slots=True, kw_only=True)
class Pump:
    """Host: the descriptor is the device of the job's file system, not yet in use."""

    job: bytes
    connection: int  # its number in /sys/fs/fuse/connections


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """Host: the job runs. From the descriptor comes how its processes end, as the pod's init tells it."""

    job: bytes
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """Either: which jobs are there?"""


Question = Depart | Deputize | Drop | Welcome | Pump | Arrived | Jobs
QUESTIONS: Final[dict[str, type[Question]]] = {
    kind.__name__: kind for kind in (Depart, Deputize, Drop, Welcome, Pump, Arrived, Jobs)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEntry:
    """One job, as a keeper tells of it."""

    job: bytes
    role: str  # HOME or HOST
    peer: str
    tasks: tuple[Task, ...]
    connected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a question."""

    error: str = ""
    remedy: str = ""
    jobs: tuple[JobEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A question on its way."""

    kind: str
    body: bytes


class KeeperError(GodwitError):
    """The keeper could not do what it was asked for."""

    exit_status = InternalError.exit_status


def _place() -> Path:
    named = os.environ.get("GODWIT_STATE_DIR")
    if named:
        return Path(named) / "keeper"
    if os.geteuid() == 0:
        return Path("/var/lib/godwit/keeper")
    return Path("~/.local/state/godwit/keeper").expanduser()


def directory() -> Path:
    """Return where the keeper of our user has its socket, made if need be. Nobody else may enter it."""
    path = _place()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise AccessError(f"{path} belongs to user {owner}", remedy="remove it")
    return path


def ask(question: Question, fds: Sequence[int] = ()) -> Answer:
    """Ask the keeper, and start it if there is none.

    Raises:
        KeeperError: It could not do it; nothing of that is left.
        InternalError: It does not answer.
    """
    with _connect() as connection:
        envelope = Envelope(kind=type(question).__name__, body=codec.encode(question))
        connection.settimeout(_ANSWERS_WITHIN_S)
        send(connection, codec.encode(envelope), fds)
        try:
            raw, _ = receive(connection)
        except OSError as error:
            raise InternalError(f"the keeper does not answer: {error}", remedy="try again") from error
    answer = codec.decode(raw, Answer)
    if answer.error:
        raise KeeperError(answer.error, remedy=answer.remedy)
    return answer


def ask_if_there(question: Question) -> Answer | None:
    """Ask the keeper if there is one; return None if not. Who may not ask has none."""
    try:
        reach().close()
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError, PermissionError):
        return None
    return ask(question)


def send(connection: socket.socket, message: bytes, fds: Sequence[int] = ()) -> None:
    """Send one message with descriptors, which stay the caller's."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([message], rights)


def receive(connection: socket.socket) -> tuple[bytes, list[OwnedFd]]:
    """Receive one message with its descriptors. Raises OSError; ConnectionError where there is none."""
    raw, ancillary, flags, _ = connection.recvmsg(
        MESSAGE_LIMIT_BYTES, socket.CMSG_SPACE(_FDS_LIMIT * 4), socket.MSG_CMSG_CLOEXEC
    )
    fds: list[OwnedFd] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds += map(OwnedFd, numbers)
    if not raw or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            fd.close()
        raise ConnectionError("no whole message came")
    return raw, fds


def socket_path() -> str:
    """Return the path of the keeper's socket. Its directory may not be there yet."""
    return str(_place() / "socket")


def reach() -> socket.socket:
    """Connect to the keeper. Raises FileNotFoundError, ConnectionRefusedError: there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(socket_path())
    except BaseException:
        connection.close()
        raise
    return connection


def _connect() -> socket.socket:
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        return reach()
    with OwnedFd(os.open(directory() / "start", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
        fcntl.flock(lock.number, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return reach()
        _start()
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                return reach()
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > deadline:
                    raise InternalError(
                        "the keeper does not start", remedy=f"see {directory() / 'log'}"
                    ) from error
            pause(_AGAIN_S)


def _start() -> None:
    with open(directory() / "log", "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "godwit", "keeper"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )


def job_of(pid: Pid) -> JobEntry | None:
    """Return the job that a process belongs to: as a deputy here, or as a guest. None: to none."""
    answer = ask_if_there(Jobs())
    for job in answer.jobs if answer is not None else ():
        for task in job.tasks:
            if task.pid == pid or (job.role == HOST and _mounts(pid) == _mounts(Pid(task.pid)) != ""):
                return job
    return None


def _mounts(pid: Pid) -> str:
    """Return which mount namespace a process is in; all of a guest's are in its pod's."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt")
    return ""
