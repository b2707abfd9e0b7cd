"""The clock offsets of a time namespace: /proc/PID/timens_offsets, time_namespaces(7)."""

from __future__ import annotations

from godwit.procfs import source
from godwit.types import Pid

_NS_PER_S = 1_000_000_000


def parse(text: str) -> tuple[int, int]:
    """Read the offsets of the monotonic and the boot clock, in nanoseconds.

    Raises:
        ValueError: A clock is missing or damaged.
    """
    offsets: dict[str, int] = {}
    for line in source.lines(text):
        words = line.split()
        if len(words) != 3:
            raise source.malformed("timens_offsets", "no offset", line)
        seconds = source.number("timens_offsets", "seconds", words[1])
        # As in every timespec, nanoseconds count upwards even where seconds are negative.
        offsets[words[0]] = seconds * _NS_PER_S + source.number("timens_offsets", "nanoseconds", words[2])
    if not {"monotonic", "boottime"} <= offsets.keys():
        raise source.malformed("timens_offsets", "a clock is missing", text)
    return offsets["monotonic"], offsets["boottime"]


def read(pid: Pid, *, proc: str = source.PROC) -> tuple[int, int]:
    """Read the offsets that the children of a process will have: of `time_for_children`.

    Raises:
        ProcessLookupError: The process is gone or a zombie.
        FileNotFoundError: The kernel has no time namespaces.
    """
    text = source.read_text(pid, "timens_offsets", proc=proc)
    if not text:
        raise source.gone(source.task_path(pid, None, proc))
    return parse(text)
