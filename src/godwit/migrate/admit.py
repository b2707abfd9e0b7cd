"""Whether this machine can take a tree: checked before anything is built, while it runs at the source."""

from __future__ import annotations

import os
import stat as stat_module
import time
from collections.abc import Iterator
from typing import Final

import xxhash

from godwit.errors import ImageError, Refusal
from godwit.linux.arch import MACHINE
from godwit.linux.pause import pause
from godwit.migrate.entries import HeaderEntry
from godwit.procfs import cpuinfo, maps, stat, status
from godwit.resources import limits, memory, pathfile, regular
from godwit.resources.outline import DemandEntry, OutlineEntry, SpaceEntry
from godwit.resources.roots import OURS, Root
from godwit.types import PAGE_SIZE, Pid

CAP_SYS_RESOURCE: Final = 24
_PID_LIMIT: Final = 1 << 22  # PID_MAX_LIMIT
_REAPED_WITHIN_S: Final = 2.0
_AGAIN_S: Final = 0.005

# What a program may have found with CPUID and chosen code for. Flags that only the kernel uses differ
# between machines without harm.
USER_FEATURES: Final = frozenset(
    "3dnowprefetch abm adx aes amx_bf16 amx_fp16 amx_int8 amx_tile avx avx2 avx512_4fmaps avx512_4vnniw"
    " avx512_bf16 avx512_bitalg avx512_fp16 avx512_vbmi2 avx512_vnni avx512_vp2intersect"
    " avx512_vpopcntdq avx512bw avx512cd avx512dq avx512er avx512f avx512ifma avx512pf avx512vbmi"
    " avx512vl avx_vnni bmi1 bmi2 cldemote clflush clflushopt clwb clzero cx16 cx8 enqcmd erms f16c fma"
    " fma4 fsgsbase fsrm gfni hle invpcid lahf_lm lwp misalignsse mmx mmxext movbe movdir64b movdiri"
    " mwaitx ospke pclmulqdq pku pni popcnt prefetchwt1 rdpid rdrand rdseed rdtscp rtm serialize sha_ni"
    " sse sse2 sse4_1 sse4_2 sse4a ssse3 tbm tsc vaes vpclmulqdq waitpkg wbnoinvd xop xsave xsavec"
    " xsaveopt xgetbv1".split()
)


def vdso_digest() -> bytes:
    """Return the digest of this kernel's vdso."""
    for mapping in maps.read_maps(Pid(os.getpid())):
        if mapping.path == "[vdso]":
            with open("/proc/self/mem", "rb", buffering=0) as mem:
                return xxhash.xxh3_128_digest(os.pread(mem.fileno(), mapping.length_bytes, mapping.start))
    return xxhash.xxh3_128_digest(b"")


def problem(header: HeaderEntry, shape: OutlineEntry) -> str:
    """Check an outline for what no honest source sends; return what is wrong, or an empty string."""
    if not shape.identities or not shape.spaces:
        return "it holds no process"
    wrong = _identity_problem(shape)
    if wrong:
        return wrong
    living = [identity.pid for identity in shape.identities if identity.state.value != "zombie"]
    if [space.pid for space in shape.spaces] != living or shape.identities[0].pid != header.pid:
        return "processes and address spaces do not match"
    for space in shape.spaces:
        wrong = _space_problem(space, len(shape.path_files))
        if wrong:
            return wrong
    if any(not _is_path(file) for file in shape.path_files):
        return "a file has no absolute path or an impossible mode"
    return ""


def _identity_problem(shape: OutlineEntry) -> str:
    pids = [identity.pid for identity in shape.identities]
    tids = [tid for identity in shape.identities for tid in identity.tids]
    if len(set(pids)) != len(pids) or len(set(tids)) != len(tids):
        return "a pid occurs twice"
    if any(not 1 < pid < _PID_LIMIT for pid in (*pids, *tids)):
        return "a pid is out of range"
    seen: set[int] = set()
    for identity in shape.identities:
        if seen and identity.ppid not in seen:
            return f"pid {identity.pid} comes before its parent"
        if not identity.tids or identity.tids[0] != identity.pid:
            return f"pid {identity.pid} does not lead its threads"
        seen.add(identity.pid)
    ids = [(each.pgid, each.sid, each.ppid, each.exit_signal) for each in shape.identities]
    if any(not 0 <= number < _PID_LIMIT for group in ids for number in group):
        return "a process has an impossible group, session, parent or signal"
    return ""


def _space_problem(space: SpaceEntry, path_files: int) -> str:
    wrong = memory.space_problem(space.vmas)
    if wrong:
        return f"pid {space.pid}: {wrong}"
    if any(start % PAGE_SIZE or end % PAGE_SIZE or not 0 < start < end for start, end in space.resident):
        return f"pid {space.pid} has an impossible run of pages"
    if any(vma.file >= path_files for vma in space.vmas):
        return f"pid {space.pid} maps a file that is not listed"
    return ""


def _is_path(file: pathfile.PathFileEntry) -> bool:
    return file.path.startswith(b"/") and b"\0" not in file.path and 0 <= file.mode < 1 << 16


def refusals(
    header: HeaderEntry,
    shape: OutlineEntry,
    demand: DemandEntry,
    *,
    in_pod: bool,
    root: Root = OURS,
    carry: set[bytes] | None = None,
    again: bool = False,
) -> Iterator[Refusal]:
    """Yield everything that this machine lacks for the tree.

    With `carry`, a file that the program writes and that is not here at all is no refusal: its path is
    added, for the source to bring the file along.

    `again`: the tree was taken already, and has changed. Much of its memory is here by now.

    Raises:
        ImageError: The outline is dishonest.
    """
    yield from _machine_refusals(header)
    if header.architecture != MACHINE:
        return
    wrong = problem(header, shape)
    if any(entry.file is not None and not _is_path(entry.file) for entry in demand.files):
        wrong = wrong or "an open file has no absolute path or an impossible mode"
    if wrong:
        raise ImageError(f"the image is malformed: {wrong}")
    if root.at_home:
        carry = None  # What is not there is nowhere.
    ours = vdso_digest()
    if any(space.vdso_digest != ours for space in shape.spaces):
        yield Refusal(
            what="kernel's vdso",
            where="destination",
            why="it differs from the source's, and the program may be inside of it or know its addresses",
            remedy="choose a machine with the same kernel build",
        )
    for index, file in enumerate(shape.path_files):
        found = pathfile.find(file, written=index in demand.written, what="mapped file", root=root)
        if found is not None and not (index in demand.written and _carry(file, carry)):
            yield found
    for entry in demand.files:
        found = regular.check(entry, root=root, running=True)
        if found is not None and not (entry.writable and entry.file and _carry(entry.file, carry)):
            yield found
    yield from _resource_refusals(0 if again else header.private_bytes, demand)
    if not in_pod:
        yield from _pid_refusals(shape)


def _carry(file: pathfile.PathFileEntry, carry: set[bytes] | None) -> bool:
    """Ask for a file to be brought along, if nothing is in its place."""
    if carry is None or not stat_module.S_ISREG(file.mode) or os.path.lexists(file.path):
        return False
    carry.add(file.path)
    return True


def _machine_refusals(header: HeaderEntry) -> Iterator[Refusal]:
    if header.architecture != MACHINE:
        yield Refusal(
            what=f"architecture {header.architecture}",
            where="destination",
            why=f"this machine is {MACHINE}",
            remedy=f"choose a machine of architecture {header.architecture}",
        )
        return
    if header.machine.page_bytes != PAGE_SIZE:
        yield Refusal(
            what=f"pages of {header.machine.page_bytes} bytes",
            where="destination",
            why=f"this kernel has pages of {PAGE_SIZE}",
            remedy="choose a machine with the same page size",
        )
    missing = (USER_FEATURES & set(header.machine.cpu_flags)) - cpuinfo.read().flags
    if missing:
        yield Refusal(
            what=f"CPU features {' '.join(sorted(missing))}",
            where="destination",
            why="the program may have chosen code that needs them, and this CPU lacks them",
            remedy="choose a machine that has them, or start the program with them masked (GLIBC_TUNABLES)",
        )


def _resource_refusals(memory_bytes: int, demand: DemandEntry) -> Iterator[Refusal]:
    available = _available_bytes()
    if memory_bytes > available:
        yield Refusal(
            what=f"{memory_bytes >> 20} MiB of memory",
            where="destination",
            why=f"only {available >> 20} MiB are available",
            remedy="make room there, or choose another machine",
        )
    us = Pid(os.getpid())
    may_raise = bool(status.read(us).cap_eff >> CAP_SYS_RESOURCE & 1)
    own = limits.collect(us)
    for entry in demand.limits:
        short = limits.shortfall(entry, own, may_raise=may_raise)
        if short:
            yield Refusal(
                what="resource limits",
                where="destination",
                why=short,
                remedy="raise the limits there (ulimit), or give godwit CAP_SYS_RESOURCE",
            )
            return


def _available_bytes() -> int:
    for line in _read_proc("meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _read_proc(name: str) -> str:
    with open(f"/proc/{name}", encoding="ascii") as file:
        return file.read()


def _pid_refusals(shape: OutlineEntry) -> Iterator[Refusal]:
    tids = [tid for identity in shape.identities for tid in identity.tids]
    taken = [tid for tid in tids if not _free_soon(tid)]
    if taken:
        yield Refusal(
            what=f"pid {taken[0]}",
            where="this machine",
            why="a process has it already" if len(taken) == 1 else f"it and {len(taken) - 1} more are taken",
            remedy="restore with --pod, which has pids of its own",
        )


def _free_soon(tid: int) -> bool:
    """Tell whether a pid is free; one that has ended is given a moment to be reaped."""
    deadline = time.monotonic() + _REAPED_WITHIN_S
    while os.path.exists(f"/proc/{tid}"):
        try:
            if stat.read(Pid(tid)).state not in "ZX" or time.monotonic() > deadline:
                return False
        except ProcessLookupError:
            continue
        pause(_AGAIN_S)
    return True
