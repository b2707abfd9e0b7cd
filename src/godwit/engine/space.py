"""The address space of a stub: emptied, mapped anew, checked."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Final

from godwit.engine import ranges
from godwit.engine.ranges import Range, Ranges
from godwit.engine.reshape import Reshape
from godwit.engine.stub import Stub
from godwit.errors import DestinationError, ImageError
from godwit.linux import mman
from godwit.procfs import maps
from godwit.resources import memory, objects
from godwit.resources.memory import Backing, VmaEntry
from godwit.tracee.calls import WORKSHOP_BYTES
from godwit.tracee.gadgets import find_call
from godwit.types import PAGE_SIZE, Fd, OwnedFd

_CALLS_PER_BATCH: Final = 500
_POPULATE_BYTES: Final = 64 << 20
_ZEROES: Final = bytes(1 << 20)
_KERNEL_ORDER: Final = (b"[vvar]", b"[vvar_vclock]", b"[vdso]")


def clear(stub: Stub) -> None:
    """Unmap everything but the workshop and what the kernel itself maps."""
    batch = stub.batch()
    for mapping in maps.read_maps(stub.pid):
        in_workshop = mapping.start < stub.workshop.address + WORKSHOP_BYTES and (
            stub.workshop.address < mapping.end
        )
        if in_workshop or memory.kernel_owned(mapping) or mapping.path == "[vsyscall]":
            continue
        if not batch.room():
            batch.run()
            batch = stub.batch()
        batch.add("munmap", mapping.start, mapping.length_bytes)
    batch.run()


def map_all(
    stub: Stub,
    vmas: Sequence[VmaEntry],
    open_path: Callable[[int, int], Fd],
    open_object: Callable[[int], OwnedFd],
) -> None:
    """Make every mapping in a cleared stub; the pages come later.

    Args:
        stub: Cleared.
        vmas: Checked by `memory.problem`.
        open_path: (index of a path file, flags) to a descriptor of ours.
        open_object: Object id to the object.
    """
    _move_kernel_mappings(stub, vmas)
    _map(stub, vmas, open_path, open_object)


def _map(
    stub: Stub,
    vmas: Sequence[VmaEntry],
    open_path: Callable[[int, int], Fd],
    open_object: Callable[[int], OwnedFd],
) -> None:
    numbers = _deliver(stub, vmas, open_path, open_object)
    mapped = [vma for vma in vmas if vma.backing is not Backing.KERNEL]
    for first in range(0, len(mapped), _CALLS_PER_BATCH):
        batch = stub.batch()
        for vma in mapped[first : first + _CALLS_PER_BATCH]:
            memory.restore_vma(vma, batch, numbers.get(_file_key(vma), -1), protection=vma.protection)
        try:
            batch.run()
        except OSError as error:
            raise DestinationError(
                f"cannot map the address space of pid {stub.inner}: {error.strerror}",
                remedy="check memory limits and overcommit at the destination",
            ) from error
    batch = stub.batch()
    for number in numbers.values():
        batch.make_room()
        batch.add("close", number)
    for vma in mapped:
        if vma.advice:
            if not batch.room(256):
                batch.run()
                batch = stub.batch()
            memory.restore_advice(vma, batch)
    batch.run()


def apply(
    stub: Stub,
    change: Reshape,
    vmas: Sequence[VmaEntry],
    open_path: Callable[[int, int], Fd],
    open_object: Callable[[int], OwnedFd],
) -> None:
    """Change an address space that was mapped before; `vmas` is all of what it then holds."""
    taken = [(vma.start, vma.end) for vma in vmas]
    if ranges.intersect(ranges.union(taken), [_workshop_range(stub)]):
        own = [(mapping.start, mapping.end) for mapping in maps.read_maps(stub.pid)]
        stub.move_workshop(memory.free_range([[*taken, *own]], WORKSHOP_BYTES))
    batch = stub.batch()
    for start, end in change.unmap:
        batch.make_room()
        batch.add("munmap", start, end - start)
    for start, end, protection in change.protect:
        batch.make_room()
        batch.add("mprotect", start, end - start, protection)
    batch.run()
    if not change.kept:
        _move_kernel_mappings(stub, vmas)
    _map(stub, change.map, open_path, open_object)


def _workshop_range(stub: Stub) -> Range:
    return (stub.workshop.address, stub.workshop.address + WORKSHOP_BYTES)


def drop(stub: Stub, vmas: Sequence[VmaEntry], runs: Ranges, *, zero: bool) -> None:
    """Have pages be as if never written. With `zero` they are to read as zeroes, whatever lies below."""
    # A page over a file or a memory object would show that again.
    covered = [vma for vma in vmas if zero and vma.backing is not Backing.ANONYMOUS]
    below = [(vma.start, vma.end) for vma in covered]
    batch = stub.batch()
    for start, end in ranges.subtract(runs, below):
        batch.make_room()
        batch.add("madvise", start, end - start, mman.MADV_DONTNEED)
    batch.run()
    for start, end in ranges.intersect(runs, below):
        for at in range(start, end, len(_ZEROES)):
            os.pwrite(stub.workshop.memory.number, _ZEROES[: end - at], at)


def verify(stub: Stub, vmas: Sequence[VmaEntry]) -> None:
    """See that the address space is what it should be, mapping by mapping.

    Raises:
        DestinationError: It is not.
    """
    workshop = [_workshop_range(stub)]
    ours = [
        (mapping.start, mapping.end, memory.protection_of(mapping))
        for mapping in maps.read_maps(stub.pid)
        if mapping.path != "[vsyscall]" and not ranges.intersect(workshop, [(mapping.start, mapping.end)])
    ]
    wanted = [(vma.start, vma.end, vma.protection) for vma in vmas]
    if _joined(ours) != _joined(wanted):
        raise DestinationError(
            f"the address space of pid {stub.inner} came out different from the source's",
            remedy="move it with --strategy stopcopy",
        )


def _joined(parts: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join neighbours of one protection: where the kernel cuts between them may differ."""
    joined: list[tuple[int, int, int]] = []
    for start, end, protection in parts:
        if joined and joined[-1][1:] == (start, protection):
            joined[-1] = (joined[-1][0], end, protection)
        else:
            joined.append((start, end, protection))
    return joined


def populate(stub: Stub, vmas: Sequence[VmaEntry], runs: Sequence[tuple[int, int]]) -> None:
    """Have memory ready where pages will come: outside the freeze, the first touch costs nobody's time.

    Best effort: what cannot be populated is when its page is written. madvise(2), Linux 5.14.
    """
    check_runs(vmas, runs)
    batch = stub.batch()
    for run_start, end in runs:
        for start in range(run_start, end, _POPULATE_BYTES):
            if not batch.room():
                batch.run()
                batch = stub.batch()
            length = min(_POPULATE_BYTES, end - start)
            batch.add("madvise", start, length, mman.MADV_POPULATE_WRITE, may_fail=True)
    batch.run()


def _file_key(vma: VmaEntry) -> tuple[int, int, int] | None:
    flags = os.O_RDWR if vma.shared and vma.may_write else os.O_RDONLY
    if vma.backing is Backing.OBJECT:
        return (0, vma.object_id, flags)
    if vma.backing is Backing.FILE:
        return (1, vma.file, flags)
    return None


def _deliver(
    stub: Stub,
    vmas: Sequence[VmaEntry],
    open_path: Callable[[int, int], Fd],
    open_object: Callable[[int], OwnedFd],
) -> dict[tuple[int, int, int] | None, int]:
    keys = list(dict.fromkeys(key for vma in vmas if (key := _file_key(vma)) is not None))
    with contextlib.ExitStack() as opened:
        fds: list[Fd] = []
        for kind, number, flags in keys:
            if kind:
                fds.append(open_path(number, flags))
            elif flags == os.O_RDWR:
                fds.append(open_object(number).number)
            else:
                again = opened.enter_context(objects.reopen(open_object(number).number, flags))
                fds.append(again.number)
        numbers = stub.deliver(fds)
    return dict(zip(keys, numbers, strict=True))


def _move_kernel_mappings(stub: Stub, vmas: Sequence[VmaEntry]) -> None:
    """Bring vvar and vdso to where the program knows them. Each can only be moved whole."""
    ours = {
        mapping.path.encode(): mapping for mapping in maps.read_maps(stub.pid) if memory.kernel_owned(mapping)
    }
    theirs = {vma.name: vma for vma in vmas if vma.backing is Backing.KERNEL}
    if all(name in ours and ours[name].start == vma.start for name, vma in theirs.items()):
        return
    taken = [(vma.start, vma.end) for vma in vmas]
    taken += [(mapping.start, mapping.end) for mapping in maps.read_maps(stub.pid)]
    hole = memory.free_range([taken], 64 * PAGE_SIZE)
    first, second = stub.batch(), stub.batch()
    flags = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
    moves = [name for name in _KERNEL_ORDER if name in theirs and name in ours]
    for name in moves:
        size = ours[name].length_bytes
        if size != theirs[name].length_bytes:
            raise DestinationError(
                f"the kernel's {name.decode()} is {size} bytes here and"
                f" {theirs[name].length_bytes} at the source",
                remedy="choose a machine with the same kernel",
            )
        first.add("mremap", ours[name].start, size, size, flags, hole)
        second.add("mremap", hole, size, size, flags, theirs[name].start)
        hole += size
    first.run()
    second.run()
    stub.workshop.gadgets = find_call(maps.read_maps(stub.pid), stub.workshop.memory)


def finish_vmas(stub: Stub, vmas: Sequence[VmaEntry]) -> None:
    """Lock and name mappings, now that their pages are there."""
    batch = stub.batch()
    for vma in vmas:
        if not batch.room(256):
            batch.run()
            batch = stub.batch()
        memory.restore_locks_and_name(vma, batch)
    batch.run()


def check_runs(vmas: Sequence[VmaEntry], runs: Sequence[tuple[int, int]]) -> None:
    """Raise ImageError unless every run lies in private mappings."""
    starts = [vma.start for vma in vmas]
    for run_start, end in runs:
        start = run_start
        while start < end:
            index = bisect.bisect_right(starts, start) - 1
            vma = vmas[index] if index >= 0 else None
            if vma is None or start >= vma.end or vma.shared or vma.backing is Backing.KERNEL:
                raise ImageError(f"page at {start:#x} belongs to no private mapping of the image")
            start = min(end, vma.end)
