"""Notes about sleeps that were begun again, kept in the program's own memory.

The kernel shows of a restarted sleep neither which call it was nor when it ends: the task sits in
restart_syscall(2). Whoever restores a sleeping thread knows both, so it leaves a page of notes, mapped
read-only, that goes along with the next move. A note counts only for the same thread at the same place
and while its time has not come.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from godwit.linux.arch import NR, UserRegs
from godwit.procfs.maps import Mapping
from godwit.types import PAGE_SIZE, page_ceil

_MAGIC: Final = b"godwit sleeps 1\n"
_NOTE: Final = struct.Struct("<iiQQQ")
VMA_NAME: Final = b"godwit sleeps"
LIMIT_BYTES: Final = 64 * PAGE_SIZE
_CALLS: Final = {NR[name]: name for name in ("nanosleep", "clock_nanosleep", "poll", "futex")}


@dataclass(frozen=True, slots=True)
class Note:
    """A sleep under way."""

    tid: int  # as the process sees it
    call: str
    instruction_pointer: int
    stack_pointer: int
    deadline_ns: int  # on the process's CLOCK_MONOTONIC

    def matches(self, registers: UserRegs) -> bool:
        """Tell whether a thread with these registers is at the place of the note."""
        here = (registers.instruction_pointer, registers.stack_pointer)
        return here == (self.instruction_pointer, self.stack_pointer)


def may_hold(mapping: Mapping) -> bool:
    """Tell whether a mapping has the shape of one with notes; its content must begin with the magic."""
    if mapping.perms != "r--p" or mapping.inode or mapping.length_bytes > LIMIT_BYTES:
        return False
    return not mapping.path or mapping.path == f"[anon:{VMA_NAME.decode()}]"


def pack(notes: Sequence[Note]) -> bytes:
    """Return the content of the mapping, in whole pages."""
    body = b"".join(
        _NOTE.pack(note.tid, NR[note.call], note.instruction_pointer, note.stack_pointer, note.deadline_ns)
        for note in notes
    )
    content = _MAGIC + body
    return content.ljust(page_ceil(len(content)), b"\0")


def parse(content: bytes) -> MappingType[int, Note] | None:
    """Return the notes by tid; None if the content is no such mapping's."""
    if not content.startswith(_MAGIC):
        return None
    found: dict[int, Note] = {}
    for at in range(len(_MAGIC), len(content) - _NOTE.size, _NOTE.size):
        tid, number, instruction, stack, deadline = _NOTE.unpack_from(content, at)
        if tid and number in _CALLS:
            found[tid] = Note(tid, _CALLS[number], instruction, stack, deadline)
    return found
