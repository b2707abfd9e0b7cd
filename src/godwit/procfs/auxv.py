"""The auxiliary vector of a process: /proc/PID/auxv, getauxval(3)."""

from __future__ import annotations

import struct

from godwit.procfs import source
from godwit.types import Pid

AT_NULL = 0

_ENTRY = struct.Struct("@LL")


def parse(raw: bytes) -> tuple[tuple[int, int], ...]:
    """Read the (key, value) pairs in order, without the AT_NULL that ends them.

    Raises:
        ValueError: The vector is cut off. An empty one is not: kernel threads have none.
    """
    if len(raw) % _ENTRY.size:
        raise ValueError(f"auxv: {len(raw)} bytes are no whole entries")
    entries: list[tuple[int, int]] = []
    for key, value in _ENTRY.iter_unpack(raw):
        if key == AT_NULL:
            return tuple(entries)
        entries.append((key, value))
    if entries:
        raise ValueError(f"auxv: no end after {len(entries)} entries")
    return ()


def read(pid: Pid, *, proc: str = source.PROC) -> tuple[tuple[int, int], ...]:
    """Read the vector of a process. Raises ProcessLookupError if it is gone or a zombie."""
    return parse(source.read_bytes(pid, "auxv", proc=proc))
