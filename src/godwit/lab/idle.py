"""The first process of a node: a static program of one page that sleeps for ever.

It needs no more. It is started with SIGCHLD ignored, and a parent that ignores SIGCHLD has its
children reaped by the kernel, those it adopts too: wait(2), notes. Signals from inside the node do
not reach a process 1 that has no handler: pid_namespaces(7). What it costs is a few kilobytes.
"""

from __future__ import annotations

import platform
import struct

from godwit.errors import RequestError

_EM = {"x86_64": 62, "aarch64": 183}
_CODE = {
    # again: mov eax, 34 (pause); syscall; jmp again
    "x86_64": bytes.fromhex("b822000000 0f05 ebf7"),
    # again: mov x0..x3, #0; mov x8, #73 (ppoll); svc #0; b again
    "aarch64": struct.pack(
        "<7I", 0xD2800000, 0xD2800001, 0xD2800002, 0xD2800003, 0xD2800928, 0xD4000001, 0x17FFFFFA
    ),
}
_BASE = 0x400000
_EHDR_BYTES = 64
_PHDR_BYTES = 56
PT_LOAD = 1
PT_GNU_STACK = 0x6474E551
PF_X, PF_W, PF_R = 1, 2, 4


def program(machine: str | None = None) -> bytes:
    """Return the program as an ELF file, elf(5).

    Args:
        machine: As uname(2) says it; None is this machine's.
    """
    machine = machine or platform.machine()
    if machine not in _CODE:
        raise RequestError(f"no lab on {machine}", remedy="use x86_64 or aarch64")
    code = _CODE[machine]
    entry = _EHDR_BYTES + 2 * _PHDR_BYTES
    length = entry + len(code)
    header = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)  # 64 bits, little-endian, System V
    header += struct.pack(
        "<HHIQQQIHHHHHH",
        2,  # ET_EXEC
        _EM[machine],
        1,
        _BASE + entry,
        _EHDR_BYTES,  # program headers follow at once
        0,
        0,
        _EHDR_BYTES,
        _PHDR_BYTES,
        2,
        0,
        0,
        0,
    )
    load = struct.pack("<IIQQQQQQ", PT_LOAD, PF_R | PF_X, 0, _BASE, _BASE, length, length, 0x10000)
    stack = struct.pack("<IIQQQQQQ", PT_GNU_STACK, PF_R | PF_W, 0, 0, 0, 0, 0, 16)
    return header + load + stack + code
