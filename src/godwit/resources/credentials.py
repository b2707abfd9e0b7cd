"""Users, groups and capabilities of a process: credentials(7), capabilities(7)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from godwit.procfs.status import TaskStatus
from godwit.tracee.calls import Batch

PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_GET_SECUREBITS: Final = 27
PR_SET_SECUREBITS: Final = 28
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37

_SECBIT_NO_SETUID_FIXUP: Final = 1 << 2
_SECBIT_KEEP_CAPS: Final = 1 << 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_HIGHEST_CAPABILITY: Final = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialsEntry:
    """Who a process is and what it may do. Ids are in the user namespace of the machine."""

    uids: tuple[int, int, int, int]  # real, effective, saved, file system
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    securebits: int
    no_new_privs: bool
    dumpable: int
    subreaper: bool


def collect(batch: Batch, status: TaskStatus) -> Callable[[], CredentialsEntry]:
    """Queue the questions; after the batch has run the answer is the entry."""
    securebits = batch.add("prctl", PR_GET_SECUREBITS, 0, 0, 0, 0)
    dumpable = batch.add("prctl", PR_GET_DUMPABLE, 0, 0, 0, 0)
    subreaper = batch.space(4)
    batch.add("prctl", PR_GET_CHILD_SUBREAPER, subreaper, 0, 0, 0)

    def answer() -> CredentialsEntry:
        return CredentialsEntry(
            uids=status.uids,
            gids=status.gids,
            groups=status.groups,
            inheritable=status.cap_inh,
            permitted=status.cap_prm,
            effective=status.cap_eff,
            bounding=status.cap_bnd,
            ambient=status.cap_amb,
            securebits=batch.results[securebits],
            no_new_privs=status.no_new_privs,
            dumpable=batch.results[dumpable],
            subreaper=struct.unpack("<i", batch.answer(subreaper, 4))[0] != 0,
        )

    return answer


def restore(entry: CredentialsEntry, batch: Batch, *, current: TaskStatus, first: bool) -> None:
    """Queue becoming that user. Every thread does it for itself, as the kernel has it.

    Args:
        entry: Of the whole process.
        batch: Of the thread.
        current: The thread as it is now; what is already right is not asked for again.
        first: The thread also restores what belongs to the process: dumpable, subreaper.
    """
    for capability in range(_HIGHEST_CAPABILITY + 1):
        bit = 1 << capability
        if current.cap_bnd & bit and not entry.bounding & bit:
            batch.add("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
    if not _same_user(entry, current):
        _become(entry, batch)
    if entry.no_new_privs:
        batch.add("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if first:
        if entry.subreaper:
            batch.add("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # A change of user clears it. 2 (root only) comes from fs.suid_dumpable and cannot be asked for.
        if entry.dumpable in (0, 1):
            batch.add("prctl", PR_SET_DUMPABLE, entry.dumpable, 0, 0, 0)


def _same_user(entry: CredentialsEntry, current: TaskStatus) -> bool:
    return (
        entry.uids == current.uids
        and entry.gids == current.gids
        and entry.groups == current.groups
        and entry.inheritable == current.cap_inh
        and entry.permitted == current.cap_prm
        and entry.effective == current.cap_eff
        and entry.ambient == current.cap_amb
        and entry.securebits == 0
    )


def _become(entry: CredentialsEntry, batch: Batch) -> None:
    # Without the fix-up, setresuid(2) leaves the capabilities alone until capset(2) sets them.
    batch.add("prctl", PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP | _SECBIT_KEEP_CAPS, 0, 0, 0)
    groups = struct.pack(f"<{len(entry.groups)}I", *entry.groups)
    batch.add("setgroups", len(entry.groups), batch.data(groups) if groups else 0)
    batch.add("setresgid", *entry.gids[:3])
    batch.add("setfsgid", entry.gids[3])
    batch.add("setresuid", *entry.uids[:3])
    batch.add("setfsuid", entry.uids[3])
    if entry.securebits & ~_SECBIT_KEEP_CAPS != _SECBIT_NO_SETUID_FIXUP:
        batch.add("prctl", PR_SET_SECUREBITS, entry.securebits, 0, 0, 0)
    words: list[int] = []
    for shift in (0, 32):
        words += [
            part >> shift & 0xFFFFFFFF for part in (entry.effective, entry.permitted, entry.inheritable)
        ]
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    batch.add("capset", header, struct.pack("<6I", *words))
    for capability in range(_HIGHEST_CAPABILITY + 1):
        if entry.ambient >> capability & 1:
            batch.add("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)
