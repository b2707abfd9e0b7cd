"""ELF files: a one-page executable made by hand, and the build id of any. elf(5)."""

from __future__ import annotations

import struct
from typing import Final

from godwit.linux.arch import EXEC_STUB_ELF_MACHINE

_LOAD_ADDRESS: Final = 0x10000  # vm.mmap_min_addr's default; nothing lies below it
SCRATCH_ADDRESS: Final = 0x20000
_HEADER_BYTES: Final = 64
_PROGRAM_HEADER_BYTES: Final = 56
PT_LOAD: Final = 1
PT_NOTE: Final = 4
NT_GNU_BUILD_ID: Final = 3
_NOTE_LIMIT_BYTES: Final = 1 << 20


def static_executable(code: bytes, *, scratch_bytes: int = 0) -> bytes:
    """Return an ELF file that maps itself in one read-only executable page and runs `code`.

    With `scratch_bytes`, so much writable memory, a multiple of the page size, stands at SCRATCH_ADDRESS.
    """
    stack = struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # PT_GNU_STACK, not executable
    scratch = struct.pack(
        "<IIQQQQQQ", PT_LOAD, 6, 0, SCRATCH_ADDRESS, SCRATCH_ADDRESS, 0, scratch_bytes, 0x1000
    )
    more = stack + scratch if scratch_bytes else stack
    segments = 1 + len(more) // _PROGRAM_HEADER_BYTES
    body_at = _HEADER_BYTES + segments * _PROGRAM_HEADER_BYTES
    size = body_at + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,  # ET_EXEC
        EXEC_STUB_ELF_MACHINE,
        1,
        _LOAD_ADDRESS + body_at,
        _HEADER_BYTES,
        0,
        0,
        _HEADER_BYTES,
        _PROGRAM_HEADER_BYTES,
        segments,
        0,
        0,
        0,
    )
    load = struct.pack("<IIQQQQQQ", PT_LOAD, 5, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 0x1000)
    return header + load + more + code


def entry_point(content: bytes) -> int:
    """Return the address at which a 64-bit little-endian ELF file begins to run. Raises ValueError."""
    if len(content) < _HEADER_BYTES or content[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no ELF file")
    return int(struct.unpack_from("<Q", content, 24)[0])


def build_id(content: bytes) -> bytes | None:
    """Find the GNU build id in the head of a little-endian 64-bit ELF file, or None.

    `content` may be cut short: what lies beyond is treated as absent.
    """
    if len(content) < _HEADER_BYTES or content[:6] != b"\x7fELF\x02\x01":
        return None
    offset, size, count = struct.unpack_from("<Q", content, 32)[0], *struct.unpack_from("<HH", content, 54)
    if size != _PROGRAM_HEADER_BYTES:
        return None
    for index in range(count):
        at = offset + index * size
        if at + size > len(content):
            return None
        kind, _, start, _, _, length, _, _ = struct.unpack_from("<IIQQQQQQ", content, at)
        if kind == PT_NOTE and length <= _NOTE_LIMIT_BYTES:
            found = _build_id_note(content[start : start + length])
            if found is not None:
                return found
    return None


def _build_id_note(notes: bytes) -> bytes | None:
    at = 0
    while at + 12 <= len(notes):
        name_bytes, content_bytes, kind = struct.unpack_from("<III", notes, at)
        content_at = at + 12 + (name_bytes + 3) // 4 * 4
        if kind == NT_GNU_BUILD_ID and notes[at + 12 : at + 12 + name_bytes] == b"GNU\0":
            return notes[content_at : content_at + content_bytes] or None
        at = content_at + (content_bytes + 3) // 4 * 4
    return None
