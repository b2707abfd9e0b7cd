"""What the processors can do: /proc/cpuinfo, proc_cpuinfo(5)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from godwit.procfs import source


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuInfo:
    """The processors of one machine."""

    flags: frozenset[str]  # those that every processor has
    vendor: str  # of the first; "" if not told
    model_name: str  # of the first; "" if not told


def parse(text: str) -> CpuInfo:
    """Read all processors. Raises ValueError if none tells its flags."""
    first: dict[str, str] = {}
    flag_sets: list[frozenset[str]] = []
    for line in source.lines(text):
        key, colon, value = line.partition(":")
        if not colon:
            raise source.malformed("cpuinfo", "no colon", line)
        name = key.strip()
        first.setdefault(name, value.strip())
        if name in ("flags", "Features"):  # x86, arm64
            flag_sets.append(frozenset(value.split()))
    if not flag_sets:
        raise source.malformed("cpuinfo", "no processor tells its flags", text)
    return CpuInfo(
        flags=flag_sets[0].intersection(*flag_sets),
        vendor=first.get("vendor_id") or first.get("CPU implementer", ""),
        model_name=first.get("model name") or first.get("CPU part", ""),
    )


def read(*, proc: str = source.PROC) -> CpuInfo:
    """Read what the processors of this machine can do."""
    with open(os.path.join(proc, "cpuinfo"), "rb") as file:
        return parse(source.decode(file.read()))
