"""System calls made inside a stopped process.

A workshop is a private mapping in the process: the interpreter's code, a table of calls, and a data
area. A batch of calls costs one stop, whatever its length (about 0.8 µs a call and 20 µs a batch).
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Iterator
from typing import Final

from godwit.errors import InternalError, UnsupportedStateError
from godwit.linux import abi, mem, mman, ptrace
from godwit.linux.arch import (
    INTERPRETER,
    NR,
    SIGNAL_FRAME_LIMIT_BYTES,
    TRAP_AT,
    signal_frame,
)
from godwit.procfs import maps, status
from godwit.tracee.gadgets import Gadgets, find_call
from godwit.tracee.task import Tracee
from godwit.types import PAGE_SIZE, OwnedFd, RemoteAddr, Tid

_ENTRY: Final = struct.Struct("<8q")
_RETURN: Final = struct.Struct("<Q")
_RED_ZONE_BYTES: Final = 128  # below the stack pointer, and the program's: System V ABI, AMD64
_FRAME_ALIGNMENT: Final = 64
_END: Final = struct.Struct("<qQQ40x")
# Ignored unless the program has a handler; at least one of these nearly always has none.
_TRAP_SIGNALS: Final = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)
FRAME_AT: Final = PAGE_SIZE
TABLE_AT: Final = FRAME_AT + SIGNAL_FRAME_LIMIT_BYTES
MAX_CALLS: Final = 1000
DATA_AT: Final = TABLE_AT + 16 * PAGE_SIZE
WORKSHOP_BYTES: Final = 64 * PAGE_SIZE


def signed(value: int) -> int:
    """Read a 64-bit word as the two's complement number that it is."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def single_call(task: Tracee, gadgets: Gadgets, memory: OwnedFd, name: str, *args: int) -> int:
    """Make one call at the gadget. Needs no memory of ours; raises OSError as the call would.

    Where the gadgets have a way back, it is laid below the thread's stack for the length of the call, and
    afterwards the thread is as it was.
    """
    registers = task.registers.copy()
    registers.aim_at_call(gadgets.call, NR[name], args)
    laid = _lay_way_back(task, gadgets, memory)
    if laid is not None:
        registers.return_into(laid[0])
    task.make_call(registers)
    result = ptrace.get_registers(task.tid).result
    if laid is not None:
        task.restore()
        os.pwrite(memory.number, laid[1], laid[0])
    if abi.is_error(result):
        abi.fail(-result, f"{name} in pid {task.pid}")
    return result


def _lay_way_back(task: Tracee, gadgets: Gadgets, memory: OwnedFd) -> tuple[int, bytes] | None:
    """Write a return address and a signal frame below the stack; return where, and what was there.

    None where there is no way back, or no room: a small stack may end there.
    """
    if not gadgets.sigreturn:
        return None
    registers = task.registers.copy()
    registers.restart_if_interrupted()
    xstate = ptrace.get_xstate(task.tid)
    # A stop at a call that nobody takes notice of becomes a SIGTRAP: blocked, it harms nobody.
    mask = task.signal_mask | 1 << (signal.SIGTRAP - 1)
    size = len(signal_frame(0, registers, mask, xstate))
    frame_at = (task.registers.stack_pointer - _RED_ZONE_BYTES - size) & ~(_FRAME_ALIGNMENT - 1)
    frame = signal_frame(frame_at, registers, mask, xstate)
    at = frame_at - _RETURN.size
    try:
        before = os.pread(memory.number, _RETURN.size + len(frame), at)
        if len(before) != _RETURN.size + len(frame):
            return None
        os.pwrite(memory.number, _RETURN.pack(gadgets.sigreturn) + frame, at)
    except (OSError, OverflowError, ValueError):
        return None
    return at, before


class Workshop:
    """The mapping in a stopped process through which calls are made. See `opened`.

    With `frames`, the injected code knows the way back to what each thread was about: should we die
    while it runs, the program goes on all the same.
    """

    def __init__(
        self,
        address: RemoteAddr,
        memory: OwnedFd,
        gadgets: Gadgets,
        *,
        trap_signal: int = signal.SIGURG,
        frames: bool = False,
    ) -> None:
        self.address = address
        self.memory = memory
        self.gadgets = gadgets
        self.trap_signal = trap_signal
        self._frames = frames
        self._framed: Tracee | None = None

    def install(self) -> None:
        """Write the interpreter's code."""
        os.pwrite(self.memory.number, INTERPRETER, self.address)

    def write_frame(self, task: Tracee) -> None:
        """Write down what the thread is about, for its way back."""
        if not self._frames or self._framed is task:
            return
        at = self.address + FRAME_AT
        registers = task.registers.copy()
        registers.restart_if_interrupted()
        frame = signal_frame(at, registers, task.signal_mask, ptrace.get_xstate(task.tid))
        if self._framed is not None:
            self.trap_signal = _trap_signal(task)
        if len(frame) > SIGNAL_FRAME_LIMIT_BYTES:
            raise InternalError(f"a signal frame of {len(frame)} bytes is too long")
        os.pwrite(self.memory.number, frame, at)
        self._framed = task

    def batch(self, task: Tracee) -> Batch:
        """Begin a batch of calls for a thread of the process."""
        return Batch(task, self)

    def call(self, task: Tracee, name: str, *args: int | bytes) -> int:
        """Make one call. Raises OSError as the call would."""
        batch = self.batch(task)
        batch.add(name, *args)
        return batch.run()[0]

    def close(self) -> None:
        """Close our side; the mapping itself is `unmap`'s business."""
        self.memory.close()

    def unmap(self, task: Tracee) -> None:
        """Remove the mapping from the process."""
        single_call(task, self.gadgets, self.memory, "munmap", self.address, WORKSHOP_BYTES)


def map_workshop(
    task: Tracee, address: int = 0, *, frames: bool = False, gadgets: Gadgets | None = None
) -> Workshop:
    """Map a workshop into the task's process: at `address`, or where the kernel likes.

    The task must have been saved. The caller unmaps it.
    """
    with mem.open_memory(task.pid) as memory:
        known = gadgets or find_call(maps.read_maps(task.pid), memory)
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
        if address:
            flags |= mman.MAP_FIXED_NOREPLACE
        protection = mman.PROT_READ | mman.PROT_WRITE | mman.PROT_EXEC
        try:
            at = single_call(task, known, memory, "mmap", address, WORKSHOP_BYTES, protection, flags, -1, 0)
        except PermissionError as error:
            raise UnsupportedStateError(
                "memory that may not be both written and executed",
                where=f"pid {task.pid}",
                why="the kernel forbids it there (PR_SET_MDWE), and calls cannot be injected without",
                remedy="start it without MemoryDenyWriteExecute",
            ) from error
        except OSError as error:
            raise UnsupportedStateError(
                f"{WORKSHOP_BYTES // 1024} KiB of address space for injected calls",
                where=f"pid {task.pid}",
                why=f"{error.strerror}",
                remedy="raise its limit of address space (ulimit -v)",
            ) from error
        trap_signal = _trap_signal(task) if frames else signal.SIGURG
        workshop = Workshop(RemoteAddr(at), memory.release(), known, trap_signal=trap_signal, frames=frames)
    workshop.install()
    return workshop


def _trap_signal(task: Tracee) -> int:
    """Choose a signal that the program neither catches nor has waiting for this thread."""
    return free_trap_signal(status.read_signals(task.pid, task.tid))


def free_trap_signal(taken: int) -> int:
    """Return a signal that is ignored by default and is not in the set."""
    return next((number for number in _TRAP_SIGNALS if not taken >> (number - 1) & 1), _TRAP_SIGNALS[0])


@contextlib.contextmanager
def opened(task: Tracee, *, gadgets: Gadgets | None = None) -> Iterator[Workshop]:
    """Open a workshop for the length of the block. On every way out the mapping is gone.

    `gadgets`, if known, may give even the calls that map and unmap it a way back.
    """
    workshop = map_workshop(task, frames=True, gadgets=gadgets)
    try:
        yield workshop
    finally:
        with contextlib.suppress(ProcessLookupError):
            workshop.unmap(task)
        workshop.close()


class Batch:
    """Calls to be made one after another by one stopped thread."""

    def __init__(self, task: Tracee, workshop: Workshop) -> None:
        self._task = task
        self._workshop = workshop
        self._names: list[str] = []
        self._may_fail: list[bool] = []
        self._table = bytearray()
        self._data = bytearray()
        self.born: list[Tid] = []
        self.results: list[int] = []

    def room(self, data_bytes: int = 0) -> bool:
        """Tell whether one more call with so much data fits."""
        limit = WORKSHOP_BYTES - DATA_AT
        return len(self._names) < MAX_CALLS and len(self._data) + data_bytes + 64 <= limit

    def make_room(self, calls: int = 1, data_bytes: int = 256) -> None:
        """See to it that so much more fits: else make the calls queued so far, and forget their results.

        Addresses that `data` and `space` gave out before are then good no more.
        """
        limit = WORKSHOP_BYTES - DATA_AT
        if len(self._names) + calls > MAX_CALLS or len(self._data) + data_bytes > limit:
            self.run()
            self._names.clear()
            self._may_fail.clear()
            self._table.clear()
            self._data.clear()

    def data(self, content: bytes) -> RemoteAddr:
        """Place bytes in the process; return their address there (16-byte aligned)."""
        at = (len(self._data) + 15) & ~15
        self._data.extend(b"\0" * (at - len(self._data)))
        self._data += content
        if DATA_AT + len(self._data) > WORKSHOP_BYTES:
            raise InternalError("batch of injected calls has too much data")
        return RemoteAddr(self._workshop.address + DATA_AT + at)

    def space(self, length_bytes: int) -> RemoteAddr:
        """Place zeroes for a call to write to; read them with `answer` after `run`."""
        return self.data(bytes(length_bytes))

    def add(self, name: str, *args: int | bytes, may_fail: bool = False) -> int:
        """Queue a call; return its place in `run`'s results. Bytes are passed by address."""
        if len(self._names) >= MAX_CALLS:
            raise InternalError("batch of injected calls is too long")
        words = [NR[name], *(signed(self.data(arg) if isinstance(arg, bytes) else arg) for arg in args)]
        words += [0] * (8 - len(words))
        self._table += _ENTRY.pack(*words)
        self._names.append(name)
        self._may_fail.append(may_fail)
        return len(self._names) - 1

    def run(self) -> list[int]:
        """Make the calls; return their raw results.

        Raises:
            OSError: A call failed that was not queued with `may_fail`. The later ones were made too.
        """
        if not self._names:
            return []
        self.enter()
        self.born += self._task.run_until_trap(self._workshop.trap_signal, self._workshop.address + TRAP_AT)
        return self.collect()

    def enter(self) -> None:
        """Write the calls to the workshop and set the thread's registers to make them when resumed."""
        base = self._workshop.address
        memory = self._workshop.memory.number
        self._workshop.write_frame(self._task)
        end = _END.pack(-1, self._workshop.trap_signal, base + FRAME_AT)
        os.pwrite(memory, bytes(self._table) + end, base + TABLE_AT)
        if self._data:
            os.pwrite(memory, self._data, base + DATA_AT)
        registers = self._task.registers.copy()
        registers.aim_at_interpreter(base, base + TABLE_AT)
        self._task.enter(registers, self._workshop.trap_signal)

    def collect(self) -> list[int]:
        """Read the results after the thread has trapped. Raises as `run` does."""
        memory = self._workshop.memory.number
        raw = os.pread(memory, len(self._table), self._workshop.address + TABLE_AT)
        self.results = [entry[7] for entry in _ENTRY.iter_unpack(raw)]
        for name, may_fail, result in zip(self._names, self._may_fail, self.results, strict=True):
            if not may_fail and abi.is_error(result):
                abi.fail(-result, f"{name} in pid {self._task.pid}")
        return self.results

    def answer(self, address: RemoteAddr, length_bytes: int) -> bytes:
        """Read what a call wrote to its space."""
        return os.pread(self._workshop.memory.number, length_bytes, address)
