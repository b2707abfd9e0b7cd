"""Files in memory without a name: memfd_create(2).

The content, the name and the seals are a memory object, which mappings share: see `objects`. Here
are the open file descriptions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import ImageError
from godwit.resources import objects
from godwit.resources.base import FileKind, Finding, OpenFile, RestoreContext, Tree, moves
from godwit.types import FileId, OwnedFd

_WHAT = "memfd"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemfdEntry:
    """An open memfd in an image."""

    file_id: FileId
    object_id: int
    offset: int
    flags: int  # O_ACCMODE bits

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open file this restores."""
        return (self.file_id,)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    return file.link.startswith("/memfd:") and not file.info.flags & os.O_PATH


@functools.cache
def _plain_device() -> int:
    """Return the device of all memfds of pages of the usual size."""
    with OwnedFd(os.memfd_create("godwit")) as fd:
        return os.fstat(fd.number).st_dev


def _check(file: OpenFile) -> None:
    if file.device != _plain_device():
        raise file.refuse(
            _WHAT, "it is made of huge pages", "start the program without huge pages (MFD_HUGETLB)"
        )


def inspect(file: OpenFile, tree: Tree) -> Finding:  # noqa: ARG001
    """Find that it moves, unless it is made of huge pages."""
    return moves(file, _WHAT, lambda: _check(file))


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[MemfdEntry]:
    """Note which memory object each is, and the offset."""
    entries: list[MemfdEntry] = []
    for file in files:
        _check(file)
        entries.append(
            MemfdEntry(
                file_id=file.file_id,
                object_id=tree.memory_object_id(file.device, file.inode),
                offset=file.info.pos,
                flags=file.info.flags & os.O_ACCMODE,
            )
        )
    return entries


def restore(entry: MemfdEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:
    """Open the memory object once more, at the offset."""
    if entry.flags & ~os.O_ACCMODE or not 0 <= entry.offset < 2**63:
        raise ImageError(f"memfd {entry.file_id} has flags {entry.flags:#x} and offset {entry.offset}")
    with objects.reopen(context.memory_object(entry.object_id).number, entry.flags) as fd:
        os.lseek(fd.number, entry.offset, os.SEEK_SET)
        return {entry.file_id: fd.release()}


KIND = FileKind(
    name="memfd",
    tag=16,
    entry=MemfdEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
