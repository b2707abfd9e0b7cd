"""What must outlive a mover: the decisions of moves that are past the point of no return.

The destination's record decides. It goes from READY to RUNNING when GO came, or to ABORTED when the
source asks and GO had not come; each change is made under the file's lock, so exactly one happens.
The source's record only says where to ask (presumed abort: Mohan, Lindsay & Obermarck 1986).
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from godwit.errors import RequestError
from godwit.resources.fdtable import LockEntry

_IDENT = re.compile(r"[0-9a-f]{32}")


class State(enum.StrEnum):
    """How a move stands in a record."""

    COMMITTED = "committed"  # source: GO may have been sent
    READY = "ready"  # destination: built, not running
    RUNNING = "running"  # destination: it owns the process
    ABORTED = "aborted"  # destination: it never ran and never will


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process that cannot be mistaken for a later one of its number."""

    pid: int  # in the namespace of the machine that wrote the record
    starttime: int
    inner: int
    stopped: bool  # by job control, before the move


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A file that went along and whose name at the source is to be removed."""

    path: bytes
    device: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One move at one end."""

    migration: str
    role: str  # source or destination
    state: State
    peer: str  # source: the HOST to ask
    members: tuple[Member, ...] = ()
    pod_init: Member | None = None
    locks: tuple[LockEntry, ...] = ()
    carried: tuple[Carried, ...] = ()
    cookie: bytes = b""  # source: of the deputies that stay; empty: none do


# Made once: a decoder made inside the freeze costs a third of a millisecond.
_DECODER = msgspec.json.Decoder(Record)


def directory() -> Path:
    """Return where records lie, made if need be."""
    named = os.environ.get("GODWIT_STATE_DIR")
    if named:
        path = Path(named)
    elif os.geteuid() == 0:
        path = Path("/var/lib/godwit/moves")
    else:
        path = Path("~/.local/state/godwit/moves").expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _path(migration: str, role: str) -> Path:
    if not _IDENT.fullmatch(migration) or role not in ("source", "destination"):
        raise RequestError(f"not the name of a move: {migration!r}")
    return directory() / f"{migration}.{role}.json"


def beside(migration: str, kind: str) -> Path:
    """Return the path of another file about a move. Raises RequestError if that is not the name of one."""
    if not _IDENT.fullmatch(migration):
        raise RequestError(f"not the name of a move: {migration!r}")
    return directory() / f"{migration}.{kind}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _read(fd: int) -> Record | None:
    raw = os.pread(fd, 1 << 24, 0)
    return _DECODER.decode(raw) if raw else None


def _write(fd: int, record: Record, *, durable: bool) -> None:
    raw = msgspec.json.encode(record)
    os.pwrite(fd, raw, 0)
    os.ftruncate(fd, len(raw))
    if durable:
        os.fdatasync(fd)


def write(record: Record) -> None:
    """Write a record, new or changed by its only owner."""
    with _locked(_path(record.migration, record.role)) as fd:
        _write(fd, record, durable=False)


def decide(migration: str, state: State) -> State:
    """Take a destination's record from READY to `state`, once; return the state that holds now.

    A move of which there is no record is noted as ABORTED: whoever comes late with a READY finds it.
    """
    with _locked(_path(migration, "destination")) as fd:
        record = _read(fd)
        if record is None:
            record = Record(migration=migration, role="destination", state=State.ABORTED, peer="")
            _write(fd, record, durable=True)
        elif record.state is State.READY:
            record = replace(record, state=state)
            # Should the machine fail now, nobody may think it never ran.
            _write(fd, record, durable=True)
        return record.state


def announce(record: Record) -> State:
    """Write a destination's READY unless the move was aborted meanwhile; return the state that holds."""
    with _locked(_path(record.migration, record.role)) as fd:
        found = _read(fd)
        if found is not None:
            return found.state
        _write(fd, record, durable=False)
        return record.state


def read(migration: str, role: str) -> Record | None:
    """Return the record, or None."""
    path = _path(migration, role)
    if not path.exists():
        return None
    with _locked(path) as fd:
        return _read(fd)


def remove(migration: str, role: str) -> None:
    """Forget a move that is settled."""
    _path(migration, role).unlink(missing_ok=True)


def age_s(record: Record) -> float:
    """Return how long ago a record was last changed, in seconds; 0 for one that is gone."""
    try:
        return time.time() - _path(record.migration, record.role).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def every() -> tuple[Record, ...]:
    """Return all records, oldest first."""
    found: list[Record] = []
    for path in sorted(directory().glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            found.append(_DECODER.decode(path.read_bytes()))
    return tuple(found)
