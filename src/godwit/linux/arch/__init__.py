"""What differs between machines, under the same names in each module.

`NR`, `MACHINE`, `UserRegs`, `SYSCALL_INSTRUCTION`, `INTERPRETER` and the functions on registers.
"""

from __future__ import annotations

import platform

from godwit.errors import DestinationError

if platform.machine() != "x86_64":  # pragma: no cover
    raise DestinationError(
        f"Godwit has no registers and call numbers for {platform.machine()} yet",
        remedy="use an x86_64 machine",
    )

from godwit.linux.arch.x86_64 import (
    CALL_AND_WAY_BACK,
    DEPUTY_CALLS_AT,
    EXEC_STUB_ELF_MACHINE,
    INTERPRETER,
    MACHINE,
    SIGNAL_FRAME_LIMIT_BYTES,
    SIGRETURN_CODES,
    SYSCALL_INSTRUCTION,
    SYSCALL_THEN_RETURN,
    TRAP_AT,
    USER_SPACE_END,
    WAY_BACK_AT,
    UserRegs,
    deputy,
    pod_init,
    signal_frame,
)
from godwit.linux.arch.x86_64_numbers import NR

__all__ = [
    "CALL_AND_WAY_BACK",
    "DEPUTY_CALLS_AT",
    "EXEC_STUB_ELF_MACHINE",
    "INTERPRETER",
    "MACHINE",
    "NR",
    "SIGNAL_FRAME_LIMIT_BYTES",
    "SIGRETURN_CODES",
    "SYSCALL_INSTRUCTION",
    "SYSCALL_THEN_RETURN",
    "TRAP_AT",
    "USER_SPACE_END",
    "WAY_BACK_AT",
    "UserRegs",
    "deputy",
    "pod_init",
    "signal_frame",
]
