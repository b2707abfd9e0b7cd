"""What a destination must know to prepare, while the program still runs at the source."""

from __future__ import annotations

from dataclasses import dataclass

from godwit.resources.limits import LimitsEntry
from godwit.resources.memory import VmaEntry
from godwit.resources.objects import ObjectEntry
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.process import IdentityEntry, ProcessState, TreeEntry
from godwit.resources.regular import RegularEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceEntry:
    """The address space of one process."""

    pid: int
    vmas: tuple[VmaEntry, ...]
    vdso_digest: bytes
    resident: tuple[tuple[int, int], ...] = ()  # runs of private pages to come, as far as known


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlineEntry:
    """A process tree in outline: who, how large, and with which files."""

    identities: tuple[IdentityEntry, ...]
    spaces: tuple[SpaceEntry, ...]  # of those that are no zombies, in order
    path_files: tuple[PathFileEntry, ...]
    objects: tuple[ObjectEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandEntry:
    """What else the destination must have."""

    files: tuple[RegularEntry, ...]
    written: tuple[int, ...]  # path files that are mapped shared and writable
    limits: tuple[LimitsEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockEntry:
    """The processes' clocks, read while the destination waits: they may never go back."""

    monotonic_ns: int
    boottime_ns: int
    since_hello_ns: int  # between the destination's greeting and this reading


def outline_of(tree: TreeEntry) -> OutlineEntry:
    """Reduce a frozen tree to its outline."""
    return OutlineEntry(
        identities=tree.identities,
        spaces=tuple(
            SpaceEntry(
                pid=process.identity.pid,
                vmas=process.memory.vmas,
                vdso_digest=process.memory.vdso_digest,
            )
            for process in tree.processes
        ),
        path_files=tree.path_files,
        objects=tree.objects,
    )


def same_family(before: OutlineEntry, now: OutlineEntry) -> bool:
    """Tell whether two outlines have the same processes and threads, standing to each other alike."""
    return _family_part(before) == _family_part(now)


def _family_part(shape: OutlineEntry) -> list[tuple[object, ...]]:
    return [
        (
            identity.pid,
            identity.ppid,
            identity.pgid,
            identity.sid,
            identity.exit_signal,
            identity.state is ProcessState.ZOMBIE,
            identity.wait_status,
            identity.tids,
        )
        for identity in shape.identities
    ]


def mapped_files(shape: OutlineEntry, space_: SpaceEntry) -> list[object]:
    """Return the path that each mapping maps, None where none: indexes differ between outlines."""
    return [shape.path_files[vma.file].path if vma.file >= 0 else None for vma in space_.vmas]
