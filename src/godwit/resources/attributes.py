"""Small marks of a process: personality(2), transparent huge pages, what a core dump holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from godwit.procfs.source import read_text
from godwit.procfs.status import TaskStatus
from godwit.tracee.calls import Batch
from godwit.types import Pid

PR_SET_THP_DISABLE: Final = 41


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributesEntry:
    """What a process or its starter set with prctl(2) and the like."""

    personality: int = 0  # PER_LINUX and flags such as ADDR_NO_RANDOMIZE
    thp_disabled: bool = False
    coredump_filter: int = 0x33


def collect(pid: Pid, status: TaskStatus) -> AttributesEntry:
    """Read the marks. Reading the personality takes the right to trace the process."""
    return AttributesEntry(
        personality=int(read_text(pid, "personality"), 16),
        thp_disabled=not status.thp_enabled,
        coredump_filter=int(read_text(pid, "coredump_filter"), 16),
    )


def restore_thread(entry: AttributesEntry, batch: Batch) -> None:
    """Queue what each thread has for itself."""
    batch.add("personality", entry.personality)


def restore_process(entry: AttributesEntry, batch: Batch) -> None:
    """Queue what the process has as a whole."""
    if entry.thp_disabled:
        batch.add("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0)


def restore_outside(entry: AttributesEntry, pid: Pid) -> None:
    """Set what is set through /proc."""
    with open(f"/proc/{pid}/coredump_filter", "wb", buffering=0) as file:
        file.write(hex(entry.coredump_filter).encode())
