"""Regular files and directories: open(2), lseek(2).

A file with a name is opened again by its path. One whose last name is gone is a memory object: its
content goes along.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from godwit.errors import Refusal
from godwit.linux import getdents
from godwit.procfs.maps import DELETED
from godwit.resources import objects, pathfile
from godwit.resources.base import Disposition, FileKind, Finding, OpenFile, RestoreContext, Tree
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.roots import Root
from godwit.types import FileId, OwnedFd

O_PATH: Final = os.O_PATH
# open(2) acts on these only at the moment of opening.
_ONCE: Final = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY
_LARGEFILE: Final = 0o100000


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularEntry:
    """An open regular file or directory."""

    file_id: FileId
    flags: int  # O_*
    offset: int
    file: PathFileEntry | None  # None: without a name
    object_id: int = 0  # of a file without a name

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The one file."""
        return (self.file_id,)

    @property
    def writable(self) -> bool:
        """The program may write through it."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY and not self.flags & O_PATH


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    kind = stat.S_IFMT(file.mode)
    return file.link.startswith("/") and kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)


def nameless(file: OpenFile) -> bool:
    """Tell whether the file lost a name. A file really called so has all of its names."""
    if not file.link.endswith(DELETED):
        return False
    found = os.stat(file.proc_path())
    with contextlib.suppress(OSError):
        return not os.path.samestat(os.lstat(file.link), found)
    return True


def inspect(file: OpenFile, tree: Tree) -> Finding:  # noqa: ARG001
    """Find a named file reachable by path, a nameless one carried whole."""
    what = "directory" if stat.S_ISDIR(file.mode) else "file"
    for lock in file.info.locks:
        if lock.kind == "LEASE":
            return file.finding(
                Disposition.REFUSE, f"lease on {file.link}", "leases are not carried yet", "give the lease up"
            )
    if not nameless(file):
        return file.finding(Disposition.REBIND, f"{what} {file.link}", "opened again by its path")
    if stat.S_ISDIR(file.mode):
        return file.finding(
            Disposition.REFUSE, f"directory {file.link}", "it was removed", "let the program leave it"
        )
    if os.stat(file.proc_path()).st_nlink:
        return file.finding(
            Disposition.REFUSE,
            f"file {file.link}",
            "the name it was opened by is gone but it has others",
            "give the file its name back with ln",
        )
    return file.finding(Disposition.MOVE, f"file {file.link}", "no name left: its content goes along")


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[RegularEntry]:
    """Note path, flags and offset of each; the content of a nameless one becomes an object."""
    return [_collect(file, tree) for file in files]


def _collect(file: OpenFile, tree: Tree) -> RegularEntry:
    flags = file.info.flags & ~(_ONCE | os.O_CLOEXEC)
    if stat.S_ISREG(file.mode):
        # What O_TMPFILE leaves behind would make a directory be looked for.
        flags &= ~os.O_TMPFILE
    if tree.has_object(file.device, file.inode):
        object_id = tree.memory_object_id(file.device, file.inode)
        return RegularEntry(
            file_id=file.file_id, flags=flags, offset=file.info.pos, file=None, object_id=object_id
        )
    reading = flags & os.O_ACCMODE == os.O_RDONLY and not flags & O_PATH
    entry = tree.path_file(file.proc_path(), os.fsencode(file.link), content=reading)
    return RegularEntry(file_id=file.file_id, flags=flags, offset=file.info.pos, file=entry)


def _what(entry: PathFileEntry) -> str:
    return "open directory" if stat.S_ISDIR(entry.mode) else "open file"


def _strict(entry: RegularEntry, file: PathFileEntry) -> bool:
    """Tell whether only the very file will do: it is written, or read from a place in a directory."""
    return entry.writable or (stat.S_ISDIR(file.mode) and entry.offset > 0)


def check(entry: RegularEntry, *, root: Root, running: bool) -> Refusal | None:
    """Check at the destination that the file can be opened again; return the refusal, or None.

    `running`: the program still runs at the source, see `pathfile.find`.
    """
    if entry.file is None:
        return None
    strict = _strict(entry, entry.file)
    return pathfile.find(entry.file, written=strict, what=_what(entry.file), root=root, running=running)


def restore(entry: RegularEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:
    """Open the file as it was."""
    flags = entry.flags & ~_LARGEFILE
    if entry.file is None:
        fd = objects.reopen(context.memory_object(entry.object_id).number, flags)
    else:
        strict = _strict(entry, entry.file)
        what = _what(entry.file)
        fd = pathfile.opened(entry.file, flags, written=strict, what=what, root=context.root)
    with fd:
        if not flags & O_PATH and entry.offset:
            if stat.S_ISDIR(os.fstat(fd.number).st_mode):
                # ext4 remembers in an open directory where it was read first. If that is its end, it stays
                # there: rewound, it seems to be empty.
                getdents.read_some(fd.number)
            os.lseek(fd.number, entry.offset, os.SEEK_SET)
        return {entry.file_id: fd.release()}


KIND = FileKind(
    name="file",
    tag=1,
    entry=RegularEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
