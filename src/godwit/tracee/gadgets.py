"""Instructions that a process has already, for calls made before there is memory of ours in it.

A system call instruction stands in the vdso, which is always mapped. Where a return follows it, and the
program's own C library (or runtime) has the end of a signal handler somewhere, such a call has a way back:
should we die while it is made, the thread returns into rt_sigreturn(2) and goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from godwit.errors import InternalError
from godwit.linux import mem
from godwit.linux.arch import SIGRETURN_CODES, SYSCALL_INSTRUCTION, SYSCALL_THEN_RETURN
from godwit.procfs import maps
from godwit.procfs.maps import Mapping
from godwit.types import OwnedFd, Pid

_SEARCHED_BYTES: Final = 64 << 20
_GADGET_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Gadgets:
    """Addresses in a process."""

    call: int  # a system call instruction
    sigreturn: int = 0  # code that makes rt_sigreturn(2); 0: unknown, or no return follows `call`


def find_call(mappings: Sequence[Mapping], memory: OwnedFd) -> Gadgets:
    """Find a system call instruction in the vdso, quickly.

    Raises:
        InternalError: The process has no vdso (booted with vdso=0).
    """
    for mapping in mappings:
        if mapping.path == "[vdso]":
            text = os.pread(memory.number, mapping.length_bytes, mapping.start)
            at = text.find(SYSCALL_INSTRUCTION)
            if at >= 0:
                return Gadgets(mapping.start + at)
    raise InternalError("a process has no vdso to make calls from")


def find(mappings: Sequence[Mapping], memory: OwnedFd, vdso: bytes) -> Gadgets | None:
    """Find a system call instruction with a way back; None without a vdso.

    Reads the program's code, a millisecond for each few MiB: to be done while the program runs.
    """
    start = next((mapping.start for mapping in mappings if mapping.path == "[vdso]"), 0)
    returning = SYSCALL_THEN_RETURN.search(vdso)
    if start and returning is not None:
        return Gadgets(start + returning.start(), _find_sigreturn(mappings, memory))
    at = vdso.find(SYSCALL_INSTRUCTION)
    return Gadgets(start + at) if start and at >= 0 else None


def of_process(pid: Pid) -> Gadgets | None:
    """Find them in a process that nobody has looked at before; None where it has no vdso."""
    mappings = maps.read_maps(pid)
    with mem.open_memory(pid) as memory:
        for mapping in mappings:
            if mapping.path == "[vdso]":
                text = os.pread(memory.number, mapping.length_bytes, mapping.start)
                return find(mappings, memory, text)
    return None


def checked(known: Gadgets | None, pid: Pid) -> Gadgets | None:
    """Return what was found earlier, if it still stands there; else look again.

    A program that executes another has its code elsewhere.
    """
    if known is not None and known.sigreturn:
        with mem.open_memory(pid) as memory:
            try:
                call = os.pread(memory.number, _GADGET_BYTES, known.call)
                back = os.pread(memory.number, _GADGET_BYTES, known.sigreturn)
            except OSError:
                return of_process(pid)
        if SYSCALL_THEN_RETURN.match(call) and back.startswith(SIGRETURN_CODES):
            return known
    return of_process(pid)


def _find_sigreturn(mappings: Sequence[Mapping], memory: OwnedFd) -> int:
    code = [each for each in mappings if each.executable and each.inode and not each.shared]
    # The C library first: nearly always it is there.
    code.sort(key=lambda each: "libc" not in os.path.basename(each.path))
    left = _SEARCHED_BYTES
    for mapping in code:
        if mapping.length_bytes > left:
            continue
        left -= mapping.length_bytes
        text = os.pread(memory.number, mapping.length_bytes, mapping.start)
        for pattern in SIGRETURN_CODES:
            at = text.find(pattern)
            if at >= 0:
                return mapping.start + at
    return 0
