"""What a destination must know to prepare, while the program still runs at the source."""

from __future__ import annotations

from dataclasses import dataclass

from godwit.resources.limits import LimitsEntry
from godwit.resources.memory import VmaEntry
from godwit.resources.objects import ObjectEntry
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.process import IdentityEntry, TreeEntry
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
