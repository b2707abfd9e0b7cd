"""What the two ends of a move tell each other besides the tree itself."""

from __future__ import annotations

from dataclasses import dataclass

from godwit.engine.latecomers import LateSignal
from godwit.errors import (
    AccessError,
    BusyError,
    DestinationError,
    GodwitError,
    ImageError,
    InternalError,
    MigrationError,
    NoProcessError,
    Refusal,
    RefusedError,
    RequestError,
    Survivor,
)
from godwit.migrate.journal import State
from godwit.resources.process import MachineEntry

_CLASSES: dict[str, type[GodwitError]] = {
    each.__name__: each
    for each in (
        AccessError,
        BusyError,
        DestinationError,
        ImageError,
        InternalError,
        NoProcessError,
        RequestError,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderEntry:
    """Who writes a stream, and of what. Readable without understanding the rest."""

    migration: str
    program: bytes  # comm of the root
    pid: int  # of the root, in its own pid namespace
    version: str  # of Godwit
    architecture: str
    machine: MachineEntry
    private_bytes: int  # memory to come, about
    postcopy: bool = False  # pages may come when the tree runs already
    parent: str = ""  # `migration` of the stream that this one goes on from; empty: it is whole by itself
    parent_digest: bytes = b""  # XXH3, 128 bits, of all of that stream
    lanes: bool = False  # further connections may come
    home: bool = False  # the job's home stays at the source, whose keeper is connected to the destination's


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloEntry:
    """What a destination is."""

    version: str
    architecture: str
    hostname: bytes
    features: tuple[str, ...] = ()  # of the protocol: what the source may make use of
    cpus: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneEntry:
    """A further connection of a move under way."""

    migration: str
    number: int  # from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEntry:
    """A round of copying is over."""

    number: int  # from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictEntry:
    """Whether the destination takes the tree."""

    refusals: tuple[Refusal, ...]
    carry: tuple[bytes, ...] = ()  # paths of written files that are not here and may be brought along
    prepared: bool = True  # False: another outline must come, with those files brought along
    postcopy: bool = False  # pages may come when the tree runs already


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """An open file, still encoded: the tag says as what."""

    tag: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesEntry:
    """All open files of the tree, in the order of restoring."""

    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndEntry:
    """How much there was."""

    pages: int
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyEntry:
    """A tree that is one call away from running."""

    pid: int  # of the root, as the destination sees it
    steps: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoEntry:
    """The decision, and what has reached the tree since it was captured."""

    signals: tuple[LateSignal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningEntry:
    """It runs."""

    resumed_ms: float  # from GO to the last thread running
    steps: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditEntry:
    """What a running destination has dealt with."""

    frames: int  # of pages, since the line was opened


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainedEntry:
    """Nothing is left behind, or nothing is awaited."""

    resumed_ms: float = 0.0  # from RUNNING until the last thread ran
    faults: int = 0  # pages that somebody waited for
    median_us: float = 0.0  # how long
    p99_us: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeEntry:
    """The line broke while pages were on their way: go on."""

    migration: str
    epoch: int = 0  # from the destination: how many lines there have been


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryEntry:
    """What became of this move?"""

    migration: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEntry:
    """This."""

    state: State
    draining: bool = False  # it runs, and pages of it are still at the source


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorEntry:
    """An error on its way to another process."""

    kind: str
    message: str
    remedy: str = ""
    survivor: Survivor | None = None
    refusals: tuple[Refusal, ...] = ()


def error_entry(error: GodwitError) -> ErrorEntry:
    """Pack an error."""
    return ErrorEntry(
        kind=type(error).__name__,
        message=error.message,
        remedy=error.remedy,
        survivor=error.survivor if isinstance(error, MigrationError) else None,
        refusals=error.refusals if isinstance(error, RefusedError) else (),
    )


def error_from(entry: ErrorEntry) -> GodwitError:
    """Unpack an error. One of an unknown class becomes an InternalError."""
    if entry.refusals:
        return RefusedError(entry.refusals)
    if entry.survivor is not None:
        return MigrationError(entry.message, survivor=entry.survivor, remedy=entry.remedy)
    return _CLASSES.get(entry.kind, InternalError)(entry.message, remedy=entry.remedy)
