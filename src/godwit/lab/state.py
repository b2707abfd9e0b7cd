"""What the host knows of laboratories: a directory each in /run/godwit/labs.

Everything else of a laboratory is held by its processes and ends with them. The directory alone
can outlive a supervisor that was killed, so it says who that was, and whoever looks next removes
what nobody holds any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from godwit.errors import BusyError, RequestError
from godwit.linux.pidfd import pidfd_open
from godwit.procfs import stat
from godwit.types import OwnedFd, Pid

LABS = Path("/run/godwit/labs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """A process that cannot be mistaken for a later one with its number. Seen from the host."""

    pid: Pid
    starttime: int  # clock ticks since boot

    @classmethod
    def of(cls, pid: Pid) -> ProcessRecord:
        """Note a process that is there now. Raises ProcessLookupError."""
        record = _seen(pid)
        if record is None:
            raise ProcessLookupError(f"no process {pid}")
        return record

    def alive(self) -> bool:
        """Tell whether it still runs."""
        return _seen(self.pid) == self

    def hold(self) -> OwnedFd | None:
        """Return a pidfd of it, or None when it has ended."""
        try:
            held = pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if not self.alive():
            held.close()
            return None
        return held


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A machine of a running laboratory."""

    name: str
    address: str
    port: int
    init: ProcessRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LabRecord:
    """A laboratory, as lab.json says it. While it starts it has no nodes, and `owner` is who starts it."""

    name: str
    owner: ProcessRecord  # the supervisor, once it is up
    nodes: tuple[NodeRecord, ...] = ()
    shared: str | None = None  # the host's directory; None: the laboratory's own
    bits_per_s: int | None = None
    delay_ns: int | None = None

    @property
    def directory(self) -> Path:
        """Its directory on the host."""
        return LABS / self.name

    def node(self, name: str) -> NodeRecord:
        """Return the node called `name`. Raises RequestError."""
        for node in self.nodes:
            if node.name == name:
                return node
        known = " ".join(node.name for node in self.nodes)
        raise RequestError(f"lab {self.name!r} has no node {name!r}", remedy=f"its nodes are: {known}")


def write(record: LabRecord) -> None:
    """Put lab.json in place, whole or not at all."""
    draft = record.directory / "lab.json.new"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    draft.rename(record.directory / "lab.json")


def read(name: str) -> LabRecord | None:
    """Return the living laboratory `name`, or None. Removes the remains of a dead one."""
    with _locked():
        return _read(name)


def living() -> list[LabRecord]:
    """Return every living laboratory by name. Removes the remains of dead ones."""
    if not LABS.is_dir():
        return []
    with _locked():
        found = [_read(path.name) for path in sorted(LABS.iterdir()) if path.is_dir()]
    return [record for record in found if record is not None]


def claim(name: str) -> LabRecord:
    """Take the name for a laboratory that the calling process is about to start.

    Raises:
        BusyError: A living laboratory has it.
    """
    LABS.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _locked():
        if _read(name) is not None:
            raise BusyError(
                f"lab {name!r} is up already",
                remedy=f"godwit lab down --name {name}, or choose another --name",
            )
        record = LabRecord(name=name, owner=ProcessRecord.of(Pid(os.getpid())))
        record.directory.mkdir(mode=0o700)
        write(record)
        return record


def remove(name: str) -> None:
    """Remove the directory of a laboratory that has ended."""
    shutil.rmtree(LABS / name, ignore_errors=True)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    if not LABS.is_dir():
        yield
        return
    with OwnedFd(os.open(LABS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield


def _read(name: str) -> LabRecord | None:
    directory = LABS / name
    try:
        record = msgspec.json.decode((directory / "lab.json").read_bytes(), type=LabRecord)
    except FileNotFoundError:
        if directory.is_dir():  # killed between two steps of `claim`, which we would otherwise wait for
            remove(name)
        return None
    if not record.owner.alive():
        remove(name)
        return None
    return record


def _seen(pid: Pid) -> ProcessRecord | None:
    try:
        seen = stat.parse(Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if seen.state in "ZX":
        return None
    return ProcessRecord(pid=pid, starttime=seen.starttime)
