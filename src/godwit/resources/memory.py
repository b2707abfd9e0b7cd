"""The address space of a process: mmap(2), prctl(2) PR_SET_MM, proc_pid_maps(5).

Entries describe the mappings; their pages travel in page frames. A page that belongs to the process
alone travels; a page of a file that the destination has too does not.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from godwit.errors import Refusal
from godwit.linux import mman
from godwit.linux.arch import USER_SPACE_END
from godwit.procfs.maps import Mapping
from godwit.procfs.stat import TaskStat
from godwit.tracee.calls import Batch
from godwit.types import PAGE_SIZE

PR_SET_MM: Final = 35
PR_SET_MM_MAP: Final = 14
_MM_MAP: Final = struct.Struct("<11QQII")
_LAYOUT_WORDS: Final = 11

# VmFlags of proc_pid_smaps(5) to the advice of madvise(2) that sets them.
_ADVICE: Final = {
    "hg": mman.MADV_HUGEPAGE,
    "nh": mman.MADV_NOHUGEPAGE,
    "dc": mman.MADV_DONTFORK,
    "dd": mman.MADV_DONTDUMP,
    "wf": mman.MADV_WIPEONFORK,
    "mg": mman.MADV_MERGEABLE,
    "sr": mman.MADV_SEQUENTIAL,
    "rr": mman.MADV_RANDOM,
}
_KERNEL_NAMES: Final = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]"})
_REFUSED_FLAGS: Final = {
    "ht": ("huge page mapping", "hugetlb memory is not carried yet", "turn huge pages off (not THP)"),
    "io": ("device memory", "it belongs to a device of this machine", "close the device"),
    "pf": ("device memory", "it belongs to a device of this machine", "close the device"),
    "um": ("userfaultfd range", "the program handles its own page faults", "turn userfaultfd off in it"),
    "uw": ("userfaultfd range", "the program tracks its own writes", "turn userfaultfd off in it"),
    "sl": ("sealed mapping", "mseal(2) is not carried yet", "run it without mseal (glibc.rtld tunable)"),
    "ss": ("shadow stack", "user shadow stacks are not carried yet", "start it with them off"),
}


class Backing(enum.StrEnum):
    """Where the pages of a mapping come from."""

    ANONYMOUS = "anonymous"
    FILE = "file"
    OBJECT = "object"
    KERNEL = "kernel"  # vdso and vvar


@dataclass(frozen=True, slots=True, kw_only=True)
class VmaEntry:
    """One mapping."""

    start: int
    end: int
    protection: int  # PROT_*
    shared: bool
    backing: Backing
    offset: int = 0
    file: int = -1  # index into the image's path files
    object_id: int = 0
    name: bytes = b""  # of PR_SET_VMA_ANON_NAME, or the kernel's own in brackets
    grows_down: bool = False
    reserve: bool = True  # False: MAP_NORESERVE
    advice: tuple[int, ...] = ()  # MADV_*
    may_write: bool = True  # of a shared mapping: its descriptor was open for writing
    locked: int = 0  # 1 mlock, 2 mlock with MLOCK_ONFAULT

    @property
    def length_bytes(self) -> int:
        """The size of the range."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEntry:
    """An address space without its pages."""

    vmas: tuple[VmaEntry, ...]  # by address
    layout: tuple[int, ...]  # the eleven addresses of struct prctl_mm_map, in its order
    auxv: bytes
    vdso_digest: bytes


def kernel_owned(mapping: Mapping) -> bool:
    """Tell whether the kernel maps this into every process by itself."""
    return mapping.path in _KERNEL_NAMES


def refusal(mapping: Mapping, pid: int) -> Refusal | None:
    """Say why a mapping cannot be carried, or None."""
    if kernel_owned(mapping) or mapping.path == "[vsyscall]":
        return None
    where = f"pid {pid} at {mapping.start:#x}"
    for flag, (what, why, remedy) in _REFUSED_FLAGS.items():
        if flag in mapping.flags:
            return Refusal(what=what, where=where, why=why, remedy=remedy)
    if mapping.protection_key:
        return Refusal(
            what="memory protection key",
            where=where,
            why="keys of pkey_alloc(2) are not carried yet",
            remedy="start it without protection keys",
        )
    name = mapping.path
    if name.startswith("/SYSV"):
        return Refusal(
            what="System V shared memory",
            where=where,
            why="segments of shmget(2) are not carried yet",
            remedy="use POSIX shared memory or a memfd",
        )
    if name.startswith(("/[aio]", "[aio]")):
        return Refusal(
            what="asynchronous I/O context",
            where=where,
            why="rings of io_setup(2) are not carried yet",
            remedy="turn native AIO off in the program",
        )
    if name.startswith(("anon_inode:", "/anon_hugepage")):
        return Refusal(what=f"mapping of {name}", where=where, why="not carried yet", remedy="")
    return None


def protection_of(mapping: Mapping) -> int:
    """Return the PROT_ bits of a mapping."""
    return (
        (mman.PROT_READ if mapping.readable else 0)
        | (mman.PROT_WRITE if mapping.writable else 0)
        | (mman.PROT_EXEC if mapping.executable else 0)
    )


def entry_of(mapping: Mapping, *, file: int = -1, object_id: int = 0) -> VmaEntry:
    """Turn a mapping into an entry. `file` or `object_id` says what it maps."""
    flags = mapping.flags
    backing = Backing.ANONYMOUS
    name = b""
    if kernel_owned(mapping):
        backing, name = Backing.KERNEL, mapping.path.encode()
    elif object_id:
        backing = Backing.OBJECT
    elif file >= 0:
        backing = Backing.FILE
    if mapping.path.startswith(("[anon:", "[anon_shmem:")):
        name = os.fsencode(mapping.path[mapping.path.index(":") + 1 : -1])
    return VmaEntry(
        start=mapping.start,
        end=mapping.end,
        protection=protection_of(mapping),
        shared=mapping.shared,
        backing=backing,
        offset=mapping.offset if backing in (Backing.FILE, Backing.OBJECT) else 0,
        file=file,
        object_id=object_id,
        name=name,
        grows_down="gd" in flags,
        reserve="nr" not in flags,
        advice=tuple(advice for flag, advice in _ADVICE.items() if flag in flags),
        may_write="mw" in flags,
        locked=0 if "lo" not in flags else (2 if "lf" in flags else 1),
    )


def collect_layout(batch: Batch, stat: TaskStat) -> Callable[[], tuple[int, ...]]:
    """Queue the question for the program break; the answer is the layout for PR_SET_MM_MAP."""
    break_index = batch.add("brk", 0)

    def answer() -> tuple[int, ...]:
        return (
            stat.start_code,
            stat.end_code,
            stat.start_data,
            stat.end_data,
            stat.start_brk,
            batch.results[break_index],
            stat.start_stack,
            stat.arg_start,
            stat.arg_end,
            stat.env_start,
            stat.env_end,
        )

    return answer


def space_problem(vmas: Sequence[VmaEntry]) -> str:
    """Check mappings that came from outside; return what is wrong, or an empty string."""
    last = 0
    for vma in vmas:
        if vma.start % PAGE_SIZE or vma.end % PAGE_SIZE or vma.offset % PAGE_SIZE:
            return f"mapping at {vma.start:#x} is not made of pages"
        if not last <= vma.start < vma.end <= USER_SPACE_END:
            return f"mapping at {vma.start:#x} is out of order or outside of user space"
        if vma.protection & ~7 or vma.offset < 0:
            return f"mapping at {vma.start:#x} has an impossible protection or offset"
        if vma.advice and not set(vma.advice) <= set(_ADVICE.values()):
            return f"mapping at {vma.start:#x} has unknown advice"
        last = vma.end
    return ""


def problem(entry: MemoryEntry) -> str:
    """Check an address space that came from outside; return what is wrong, or an empty string."""
    if len(entry.layout) != _LAYOUT_WORDS or not all(0 <= word <= USER_SPACE_END for word in entry.layout):
        return f"the layout is not {_LAYOUT_WORDS} addresses"
    if len(entry.auxv) > 2 * PAGE_SIZE or len(entry.auxv) % 16:
        return "the auxiliary vector has an impossible length"
    return space_problem(entry.vmas)


def free_range(spaces: Iterable[Sequence[tuple[int, int]]], length_bytes: int) -> int:
    """Find a range free in every one of the given lists of (start, end), or raise ValueError."""
    taken = sorted(span for space in spaces for span in space)
    low = 0x10000000
    for start, end in taken:
        if start >= low + length_bytes + PAGE_SIZE:
            return low
        low = max(low, end + PAGE_SIZE)
    if low + length_bytes < USER_SPACE_END:
        return low
    raise ValueError("no free address range")


def map_flags(vma: VmaEntry) -> int:
    """Return the MAP_ flags that make the mapping."""
    flags = mman.MAP_FIXED_NOREPLACE | (mman.MAP_SHARED if vma.shared else mman.MAP_PRIVATE)
    if vma.backing is Backing.ANONYMOUS:
        flags |= mman.MAP_ANONYMOUS
    if vma.grows_down:
        flags |= mman.MAP_GROWSDOWN
    if not vma.reserve:
        flags |= mman.MAP_NORESERVE
    return flags


def restore_vma(vma: VmaEntry, batch: Batch, fd: int, *, protection: int) -> None:
    """Queue making the mapping from descriptor `fd` (-1: anonymous).

    `protection` may be wider than the entry's, until `restore_advice` has narrowed it.
    """
    batch.add("mmap", vma.start, vma.length_bytes, protection, map_flags(vma), fd, vma.offset)


def restore_advice(vma: VmaEntry, batch: Batch) -> None:
    """Queue the advice of madvise(2): before pages come, so that they come in the advised size."""
    for advice in vma.advice:
        batch.add("madvise", vma.start, vma.length_bytes, advice)


def restore_locks_and_name(vma: VmaEntry, batch: Batch) -> None:
    """Queue memory locks and the name: after the pages came."""
    if vma.locked:
        batch.add("mlock2", vma.start, vma.length_bytes, mman.MLOCK_ONFAULT if vma.locked == 2 else 0)
    if vma.name and vma.backing is not Backing.KERNEL:
        name = batch.data(vma.name + b"\0")
        arguments = (mman.PR_SET_VMA, mman.PR_SET_VMA_ANON_NAME, vma.start, vma.length_bytes, name)
        # A kernel without CONFIG_ANON_VMA_NAME shows no names either.
        batch.add("prctl", *arguments, may_fail=True)


def restore_layout(entry: MemoryEntry, batch: Batch, exe_fd: int) -> None:
    """Queue telling the kernel where code, data, heap, stack and arguments lie, and the executable."""
    auxv = batch.data(entry.auxv)
    mm_map = _MM_MAP.pack(*entry.layout, auxv, len(entry.auxv), exe_fd & 0xFFFFFFFF)
    batch.add("prctl", PR_SET_MM, PR_SET_MM_MAP, mm_map, len(mm_map), 0)
