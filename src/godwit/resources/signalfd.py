"""Signals read as a file: signalfd(2).

The object holds nothing but a mask; the signals wait with the task that reads, and move with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import ImageError
from godwit.linux import signalfd
from godwit.resources.base import FileKind, Finding, OpenFile, RestoreContext, Tree, moves
from godwit.types import FileId, OwnedFd

_WHAT = "signalfd"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalFdEntry:
    """A signalfd in an image."""

    file_id: FileId
    mask: int  # bit 0 is signal 1

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open file this restores."""
        return (self.file_id,)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    return file.link == "anon_inode:[signalfd]"


def inspect(file: OpenFile, tree: Tree) -> Finding:  # noqa: ARG001
    """Find that it moves."""
    return moves(file, _WHAT)


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[SignalFdEntry]:  # noqa: ARG001
    """Note the masks."""
    return [SignalFdEntry(file_id=file.file_id, mask=int(file.info.fields["sigmask"], 16)) for file in files]


def restore(entry: SignalFdEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:  # noqa: ARG001
    """Make a signalfd for the same signals."""
    if not 0 <= entry.mask < 2**64:
        raise ImageError(f"signalfd {entry.file_id} has the impossible mask {entry.mask:#x}")
    return {entry.file_id: signalfd.create(entry.mask)}


KIND = FileKind(
    name="signalfd",
    tag=12,
    entry=SignalFdEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
