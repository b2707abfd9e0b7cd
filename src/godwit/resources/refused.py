"""Files that cannot be carried, each by its name with the reason and the remedy.

`KIND` stands before the kinds that take any file with a path; `UNKNOWN` stands last and takes the
rest. docs/limits.md is made from the table.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import ImageError
from godwit.resources import sockets
from godwit.resources.base import Disposition, FileKind, Finding, OpenFile, RestoreContext, Tree
from godwit.types import FileId, OwnedFd

_CLOSE = "let the program close it"
_TTY_MAJORS = frozenset({4, 5, *range(136, 144)})
_CARRIED_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that is refused."""

    what: str
    matches: Callable[[OpenFile], bool]
    why: str
    remedy: str = _CLOSE


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedEntry:
    """What an image never holds."""

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """No open file."""
        return ()


def _linked(*starts: str) -> Callable[[OpenFile], bool]:
    return lambda file: file.link.startswith(starts)


def _family(*families: int) -> Callable[[OpenFile], bool]:
    def matches(file: OpenFile) -> bool:
        identity = sockets.identify(file)
        return identity is not None and identity.family in families

    return matches


def _is_other_socket(file: OpenFile) -> bool:
    identity = sockets.identify(file)
    return identity is not None and identity.family not in _CARRIED_FAMILIES


def _is_tty(file: OpenFile) -> bool:
    return stat.S_ISCHR(file.mode) and os.major(file.rdevice) in _TTY_MAJORS


def _device(major: int, minor: int) -> Callable[[OpenFile], bool]:
    return lambda file: stat.S_ISCHR(file.mode) and file.rdevice == os.makedev(major, minor)


def _is_other_device(file: OpenFile) -> bool:
    same_everywhere = stat.S_ISCHR(file.mode) and file.rdevice in _SAME_EVERYWHERE
    return (stat.S_ISCHR(file.mode) or stat.S_ISBLK(file.mode)) and not same_everywhere


_SAME_EVERYWHERE = frozenset(os.makedev(1, minor) for minor in (3, 5, 7, 8, 9))


def _is_path_only(file: OpenFile) -> bool:
    kinds = (stat.S_ISFIFO, stat.S_ISCHR, stat.S_ISBLK, stat.S_ISSOCK)
    return bool(file.info.flags & os.O_PATH) and any(is_kind(file.mode) for is_kind in kinds)


ROWS: tuple[Row, ...] = (
    Row(
        what="descriptor opened with O_PATH",
        matches=_is_path_only,  # before the devices: it is no open device
        why="only those of files and directories are carried",
    ),
    Row(
        what="terminal",
        matches=_is_tty,
        why="a terminal belongs to this machine",
        remedy="start the program with its input and output redirected, under setsid",
    ),
    Row(what="kernel log", matches=_device(1, 11), why="it is this machine's"),
    Row(what="userfaultfd", matches=_device(10, 126), why="it hands out page faults of this machine"),
    Row(what="FUSE file system", matches=_device(10, 229), why="what it serves is mounted here"),
    Row(what="network tunnel", matches=_device(10, 200), why="its interface is this machine's"),
    Row(what="virtual machines (KVM)", matches=_device(10, 232), why="the kernel keeps their state"),
    Row(what="device", matches=_is_other_device, why="devices belong to this machine"),
    Row(what="inotify", matches=_linked("anon_inode:inotify"), why="queued events cannot be read out"),
    Row(what="fanotify", matches=_linked("anon_inode:[fanotify]"), why="it watches this machine's files"),
    Row(
        what="userfaultfd",
        matches=_linked("anon_inode:[userfaultfd]"),
        why="faults that wait cannot be read out",
    ),
    Row(
        what="io_uring",
        matches=_linked("anon_inode:[io_uring]"),
        why="requests on their way cannot be read out",
        remedy="have the program use epoll instead (node: UV_USE_IO_URING=0)",
    ),
    Row(
        what="performance counter",
        matches=_linked("anon_inode:[perf_event]"),
        why="it counts this machine's events",
        remedy="end the profiler",
    ),
    Row(
        what="BPF object",
        matches=_linked("anon_inode:bpf", "anon_inode:[bpf", "anon_inode:btf"),
        why="it is loaded into this kernel",
    ),
    Row(
        what="pidfd",
        matches=_linked("anon_inode:[pidfd]", "pidfd:["),
        why="processes it holds are not carried yet",
    ),
    Row(
        what="seccomp listener",
        matches=_linked("anon_inode:seccomp notify"),
        why="calls that wait for it cannot be read out",
    ),
    Row(
        what="namespace",
        matches=_linked(*(f"{name}:[" for name in "cgroup ipc mnt net pid time user uts".split())),
        why="namespaces belong to this machine",
    ),
    Row(
        what="message queue",
        matches=_linked("/dev/mqueue/"),
        why="POSIX message queues are not carried yet",
    ),
    Row(
        what="System V shared memory",
        matches=_linked("/SYSV"),
        why="its segment is known to this machine by a key",
        remedy="have the program use memfd_create or shared mappings",
    ),
    Row(what="netlink socket", matches=_family(socket.AF_NETLINK), why="it talks to this kernel"),
    Row(what="packet socket", matches=_family(socket.AF_PACKET), why="it listens to this machine's network"),
    Row(what="vsock", matches=_family(socket.AF_VSOCK), why="it leads to this machine's hypervisor"),
    Row(what="socket of another family", matches=_is_other_socket, why="its family is not carried"),
    Row(
        what="file of /proc",
        matches=_linked("/proc/"),
        why="it tells of this machine and its processes",
        remedy="let the program close it and open it again",
    ),
    Row(
        what="file of /sys",
        matches=_linked("/sys/"),
        why="it tells of this machine",
        remedy="let the program close it and open it again",
    ),
)

_OTHER = Row(what="file", matches=lambda file: True, why="Godwit does not know its kind")  # noqa: ARG005


def row_of(file: OpenFile) -> Row | None:
    """Return the first row that fits."""
    return next((row for row in ROWS if row.matches(file)), None)


def claims(file: OpenFile) -> bool:
    """Tell whether the table names the file."""
    return row_of(file) is not None


def inspect(file: OpenFile, tree: Tree) -> Finding:  # noqa: ARG001
    """Find that it cannot move, and why."""
    row = row_of(file) or _OTHER
    return file.finding(Disposition.REFUSE, f"{row.what} {file.link}", row.why, row.remedy)


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[RefusedEntry]:  # noqa: ARG001
    """Raise UnsupportedStateError with the words of `inspect`, if there is any such file."""
    for file in files:
        row = row_of(file) or _OTHER
        raise file.refuse(f"{row.what} {file.link}", row.why, row.remedy)
    return ()


def restore(entry: RefusedEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:  # noqa: ARG001
    """Refuse: no Godwit writes such an entry."""
    raise ImageError("the image holds an open file of a kind that is never carried")


KIND = FileKind(
    name="refused",
    tag=19,
    entry=RefusedEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)

UNKNOWN = FileKind(
    name="unknown",
    tag=20,
    entry=RefusedEntry,
    claims=lambda file: True,  # noqa: ARG005
    inspect=inspect,
    collect=collect,
    restore=restore,
)
