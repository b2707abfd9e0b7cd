"""A process: its identity and everything it holds, in one entry."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from godwit.resources.attributes import AttributesEntry
from godwit.resources.credentials import CredentialsEntry
from godwit.resources.fdtable import CommonEntry, DescriptorEntry, LockEntry
from godwit.resources.limits import LimitsEntry
from godwit.resources.memory import MemoryEntry
from godwit.resources.objects import ObjectEntry
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.signals import SignalsEntry
from godwit.resources.thread import ThreadEntry
from godwit.resources.timers import TimersEntry


class ProcessState(enum.StrEnum):
    """How the process stands."""

    RUNNING = "running"
    STOPPED = "stopped"  # by job control
    ZOMBIE = "zombie"


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityEntry:
    """Where a process stands in its tree. All ids are of the tree's own pid namespace."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    exit_signal: int
    state: ProcessState
    wait_status: int = 0  # of a zombie, as waitpid(2) gives it
    comm: bytes = b""
    tids: tuple[int, ...] = ()  # leader first


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEntry:
    """A process that is not a zombie."""

    identity: IdentityEntry
    umask: int
    exe: int  # index into the image's path files, like the next two
    cwd: int
    root: int  # -1: the root of its mount namespace
    memory: MemoryEntry
    credentials: CredentialsEntry
    signals: SignalsEntry
    timers: TimersEntry
    limits: LimitsEntry
    threads: tuple[ThreadEntry, ...]  # leader first
    descriptors: tuple[DescriptorEntry, ...]
    attributes: AttributesEntry = field(default_factory=AttributesEntry)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineEntry:
    """What the processes see of their machine, at the time of the freeze."""

    hostname: bytes
    domainname: bytes
    boot_id: bytes
    realtime_ns: int
    monotonic_ns: int  # as the processes see it
    boottime_ns: int
    page_bytes: int
    cpu_flags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeEntry:
    """A process tree, but for its open files and its pages."""

    machine: MachineEntry
    identities: tuple[IdentityEntry, ...]  # parents before children; the first is the root
    processes: tuple[ProcessEntry, ...]  # those of `identities` that are no zombies, in that order
    path_files: tuple[PathFileEntry, ...]
    objects: tuple[ObjectEntry, ...]
    common: tuple[CommonEntry, ...]
    locks: tuple[LockEntry, ...]
