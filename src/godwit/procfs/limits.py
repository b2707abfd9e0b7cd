"""The resource limits of a process: /proc/PID/limits, getrlimit(2).

Readable where prlimit(2) is refused.
"""

from __future__ import annotations

from godwit.procfs import source
from godwit.types import Pid

RLIM_INFINITY = 2**64 - 1

# In order of RLIMIT_*, counting from 0.
_NAMES = (
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
)
_NUMBERS = {name: number for number, name in enumerate(_NAMES)}
_NAME_WIDTH = 25


def _parse_value(text: str) -> int:
    return RLIM_INFINITY if text == "unlimited" else source.number("limits", "value", text)


def parse(text: str) -> dict[int, tuple[int, int]]:
    """Read (soft, hard) of every RLIMIT_*, RLIM_INFINITY where unlimited.

    Raises:
        ValueError: A limit is missing, or one we do not know is there.
    """
    limits: dict[int, tuple[int, int]] = {}
    for line in source.lines(text)[1:]:
        name, values = line[:_NAME_WIDTH].rstrip(), line[_NAME_WIDTH:].split()
        if name not in _NUMBERS or len(values) < 2:
            raise source.malformed("limits", "no limit we know", line)
        limits[_NUMBERS[name]] = _parse_value(values[0]), _parse_value(values[1])
    for name, number in _NUMBERS.items():
        if number not in limits:
            raise source.malformed("limits", f"no {name!r}", text)
    return limits


def read(pid: Pid, *, proc: str = source.PROC) -> dict[int, tuple[int, int]]:
    """Read the limits of a process. Raises ProcessLookupError if it is gone."""
    return parse(source.read_text(pid, "limits", proc=proc))
