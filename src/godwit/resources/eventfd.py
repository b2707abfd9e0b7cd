"""Event counters: eventfd(2).

The kernel keeps a 64-bit counter and a mode bit per open file description, both shown in fdinfo.
Status flags and the owner for SIGIO belong to every file: see the descriptor table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import ImageError
from godwit.resources.base import FileKind, Finding, OpenFile, RestoreContext, Tree, moves
from godwit.types import FileId, OwnedFd

_WHAT = "eventfd"
# The kernel itself may count up to 2**64 - 1; a write stops one short of that.
_COUNTER_MAX = 2**64 - 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFdEntry:
    """An eventfd in an image."""

    file_id: FileId
    counter: int  # events not yet read, 64 bits
    semaphore: bool  # EFD_SEMAPHORE: a read takes 1, not all

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open file this restores."""
        return (self.file_id,)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    return file.link == "anon_inode:[eventfd]"


def _entry(file: OpenFile) -> EventFdEntry:
    fields = file.info.fields
    if "eventfd-semaphore" not in fields:
        # Before Linux 6.5 nothing shows the mode.
        raise file.refuse(_WHAT, "this kernel does not tell how it counts", "use Linux 6.5 or newer")
    counter = int(fields["eventfd-count"], 16)
    if counter > _COUNTER_MAX:
        raise file.refuse(_WHAT, "its counter has overflowed", "let the program read it, then try again")
    return EventFdEntry(file_id=file.file_id, counter=counter, semaphore=fields["eventfd-semaphore"] == "1")


def inspect(file: OpenFile, tree: Tree) -> Finding:  # noqa: ARG001
    """Find that it moves, where the kernel shows its mode."""
    return moves(file, _WHAT, lambda: _entry(file))


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[EventFdEntry]:  # noqa: ARG001
    """Note the counters without reading from the descriptors, which would change them."""
    return [_entry(file) for file in files]


def restore(entry: EventFdEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:  # noqa: ARG001
    """Make an eventfd that the next read cannot tell from the old one."""
    if not 0 <= entry.counter <= _COUNTER_MAX:
        raise ImageError(f"eventfd {entry.file_id} has the impossible counter {entry.counter}")
    mode = os.EFD_SEMAPHORE if entry.semaphore else 0
    with OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | mode)) as fd:
        # eventfd(2) takes 32 bits of initial value; the counter has 64.
        os.eventfd_write(fd.number, entry.counter)
        return {entry.file_id: fd.release()}


KIND = FileKind(
    name="eventfd",
    tag=10,
    entry=EventFdEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
