"""Single calls in a stopped deputy, with buffers in memory that it has for nothing else."""

from __future__ import annotations

import os
from typing import Final

from godwit.errors import RequestError
from godwit.linux import elf, mem
from godwit.tracee import calls
from godwit.tracee.gadgets import Gadgets
from godwit.tracee.task import Tracee

SCRATCH_BYTES: Final = 64 << 10


def call(task: Tracee, gadgets: Gadgets, name: str, *args: int | bytes) -> tuple[int, tuple[bytes, ...]]:
    """Make a call in a saved deputy, which stays stopped; return its result, and what its buffers hold then.

    Bytes are passed by address. Should we die meanwhile, the deputy goes on with what it was about.

    Raises:
        OSError: As the call would.
        RequestError: The buffers are too large.
        NoProcessError: The deputy died.
    """
    words: list[int] = []
    buffers: list[tuple[int, int]] = []
    at = elf.SCRATCH_ADDRESS
    with mem.open_memory(task.pid) as memory:
        for arg in args:
            if isinstance(arg, int):
                words.append(arg)
                continue
            if at + len(arg) > elf.SCRATCH_ADDRESS + SCRATCH_BYTES:
                raise RequestError(f"more than {SCRATCH_BYTES} bytes for a call in a deputy")
            os.pwrite(memory.number, arg, at)
            words.append(at)
            buffers.append((at, len(arg)))
            at += (len(arg) + 15) & ~15
        result = calls.single_call(task, gadgets, memory, name, *words)
        return result, tuple(os.pread(memory.number, length, start) for start, length in buffers)
