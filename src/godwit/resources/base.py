"""What every kind of open file has in common: how the engine asks, and what it is told.

A module of this package claims the open files of its kind, tells beforehand whether they can move,
collects them into entries while the program is frozen, and makes them anew at the destination.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from godwit.errors import Refusal, UnsupportedStateError
from godwit.linux import pidfd
from godwit.procfs.fdinfo import FdInfo
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.roots import Root
from godwit.types import Fd, FileId, OwnedFd, Pid

_GONE = (errno.ESRCH, errno.ENOENT, errno.EBADF)


class Disposition(enum.StrEnum):
    """What a move does about one holding (Fuggetta, Picco & Vigna 1998)."""

    MOVE = "move"  # it goes along
    REBIND = "rebind"  # the destination's own takes its place
    REACH = "reach"  # it stays behind and is used over the network
    REFUSE = "refuse"  # none of these: nothing moves


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One holding and what a move would do about it."""

    disposition: Disposition
    what: str
    where: str
    why: str = ""
    remedy: str = ""

    def refusal(self) -> Refusal:
        """Return the same words as an error carries them."""
        return Refusal(what=self.what, where=self.where, why=self.why, remedy=self.remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """One open file description held by the tree; every (pid, fd) that shares it is in `holders`."""

    file_id: FileId
    holders: tuple[tuple[Pid, Fd], ...]  # pids in the caller's namespace; never empty; sorted
    link: str  # readlink /proc/PID/fd/N of the first holder
    info: FdInfo
    mode: int  # st_mode through the descriptor
    device: int  # st_dev
    rdevice: int  # st_rdev
    inode: int  # st_ino
    where: str  # "pid 12 fd 3", for messages

    def duplicate(self) -> OwnedFd:
        """Take a descriptor of ours for the same description: offset and status flags are shared.

        Raises:
            ProcessLookupError: The first holder has exited.
            PermissionError: We may not ptrace it.
            OSError: EBADF, it has closed the descriptor.
        """
        pid, fd = self.holders[0]
        with pidfd.pidfd_open(pid) as process:
            return pidfd.pidfd_getfd(process.number, fd)

    def proc_path(self) -> str:
        """Name the file in /proc; opening that makes a new description of the same file."""
        pid, fd = self.holders[0]
        return f"/proc/{pid}/fd/{fd}"

    def refuse(self, what: str, why: str, remedy: str = "") -> UnsupportedStateError:
        """Build the error that says this file cannot be carried, and where it is."""
        return UnsupportedStateError(what, where=self.where, why=why, remedy=remedy)

    def finding(self, disposition: Disposition, what: str, why: str = "", remedy: str = "") -> Finding:
        """Build a finding about this file."""
        return Finding(disposition=disposition, what=what, where=self.where, why=why, remedy=remedy)


class Tree(Protocol):
    """What a kind may ask about the whole process tree."""

    @property
    def files(self) -> Sequence[OpenFile]:
        """All open files of the tree."""
        ...

    @property
    def pids(self) -> frozenset[Pid]:
        """All processes of the tree, in the caller's pid namespace."""
        ...

    @property
    def closes_connections(self) -> bool:
        """The user allows TCP connections to break: the program finds them reset."""
        ...

    def file_at(self, pid: Pid, fd: Fd) -> OpenFile | None:
        """Return what a process of the tree has open under a number."""
        ...

    def outside_holders(self, inode_link: str) -> Sequence[tuple[Pid, Fd]]:
        """Return who, not being of the tree, has something open whose link reads `inode_link`."""
        ...

    def memory_object_id(self, device: int, inode: int) -> int:
        """Return the number of the shared memory object that is this file's content."""
        ...

    def has_object(self, device: int, inode: int) -> bool:
        """Tell whether this file's content goes along as a memory object."""
        ...

    def path_file(self, proc_path: str, path: bytes, *, content: bool) -> PathFileEntry:
        """Describe a file with a name, reached through a link in /proc; answers are remembered."""
        ...


class RestoreContext(Protocol):
    """What a kind may ask while it makes open files in the builder at the destination."""

    @property
    def files(self) -> Mapping[FileId, OwnedFd]:
        """What was restored so far, by kinds that stand earlier in the registry."""
        ...

    @property
    def inner_pid(self) -> Pid:
        """The root of the tree, in its own pid namespace."""
        ...

    @property
    def root(self) -> Root:
        """Where the tree's names begin."""
        ...

    def memory_object(self, object_id: int) -> OwnedFd:
        """Return the context's own descriptor, open for reading and writing: do not close it."""
        ...


class AttachContext(Protocol):
    """What a kind may do once every process of the tree has its descriptors."""

    def holders(self, file_id: FileId) -> Sequence[tuple[Pid, Fd]]:
        """Return who holds the file; pids of the tree's own pid namespace."""
        ...

    def call(self, inner_pid: Pid, name: str, *args: int | bytes) -> int:
        """Make one system call inside a stopped process; bytes go by the address of a copy.

        Raises:
            OSError: The call failed.
        """
        ...


class Entry(Protocol):
    """What an image holds of one or more open files: a frozen dataclass."""

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open files this entry restores."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """One kind of open file, as the engine sees it."""

    name: str
    tag: int  # on the wire, for good
    entry: type[Any]  # msgspec decodes into it; an `Entry`
    claims: Callable[[OpenFile], bool]
    # While the program runs: cheap, and never an error about the file itself.
    inspect: Callable[[OpenFile, Tree], Finding]
    # All files of the kind at once, the program frozen; it is not changed. Raises UnsupportedStateError.
    collect: Callable[[Sequence[OpenFile], Tree], Sequence[Any]]
    # In the builder process at the destination. The caller closes what it gets.
    restore: Callable[[Any, RestoreContext], Mapping[FileId, OwnedFd]]
    # After every process has its descriptor table and its memory, before record locks are taken.
    attach: Callable[[Any, AttachContext], None] | None = None


def moves(file: OpenFile, what: str, check: Callable[[], object] = lambda: None, *, why: str = "") -> Finding:
    """Find that the file moves along, unless `check` raises why not."""
    try:
        check()
    except UnsupportedStateError as error:
        first = error.refusals[0]
        return Finding(
            disposition=Disposition.REFUSE,
            what=first.what,
            where=first.where,
            why=first.why,
            remedy=first.remedy,
        )
    except OSError as error:
        if error.errno not in _GONE:
            raise
        # It went away while we looked: there is nothing left to refuse, and a move looks again.
        return file.finding(Disposition.MOVE, what, "closed meanwhile")
    return file.finding(Disposition.MOVE, what, why)


def refuse_outside_holders(file: OpenFile, tree: Tree, what: str) -> None:
    """Raise UnsupportedStateError if somebody outside the tree has the same object open.

    To be called while we hold no duplicate of it: we are outside too.
    """
    outside = tree.outside_holders(file.link)
    if outside:
        pid, fd = outside[0]
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        raise file.refuse(
            what,
            f"pid {pid} (fd {fd}){more}, which does not move along, has it open too",
            f"move a process that is an ancestor of pid {pid} too, or end pid {pid}",
        )
