"""Resource limits of a process: prlimit(2), and its standing with the out-of-memory killer."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from godwit.procfs import limits
from godwit.procfs.source import read_text
from godwit.tracee.calls import Batch
from godwit.types import Pid


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit; 2**64 - 1 is none."""

    resource: int  # RLIMIT_*
    soft: int
    hard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsEntry:
    """Every resource limit, and oom_score_adj."""

    limits: tuple[Limit, ...]
    oom_score_adj: int


def collect(pid: Pid) -> LimitsEntry:
    """Read the limits of a process; it may be running."""
    found = limits.read(pid)
    return LimitsEntry(
        limits=tuple(Limit(resource=n, soft=soft, hard=hard) for n, (soft, hard) in sorted(found.items())),
        oom_score_adj=int(read_text(pid, "oom_score_adj")),
    )


def shortfall(entry: LimitsEntry, own: LimitsEntry, *, may_raise: bool) -> str:
    """Say what of `entry` a builder with limits `own` cannot grant; empty if nothing."""
    if may_raise:
        return ""
    mine = {limit.resource: limit for limit in own.limits}
    for limit in entry.limits:
        if limit.resource in mine and limit.hard > mine[limit.resource].hard:
            return f"its hard limit {limit.hard} of resource {limit.resource} is above ours"
    if entry.oom_score_adj < own.oom_score_adj:
        return f"its oom_score_adj {entry.oom_score_adj} is below ours"
    return ""


def restore(entry: LimitsEntry, batch: Batch) -> None:
    """Queue the limits: after what a low one would hinder, before the right to raise them is given up."""
    for limit in entry.limits:
        batch.make_room()
        batch.add("prlimit64", 0, limit.resource, struct.pack("<QQ", limit.soft, limit.hard), 0)


def restore_oom(entry: LimitsEntry, pid: Pid) -> None:
    """Set oom_score_adj from outside."""
    path = f"/proc/{pid}/oom_score_adj"
    with open(path, "r+b", buffering=0) as file:
        if int(file.read()) != entry.oom_score_adj:
            file.write(str(entry.oom_score_adj).encode())
