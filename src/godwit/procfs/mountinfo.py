"""The mounts a process sees: /proc/PID/mountinfo, proc_pid_mountinfo(5)."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from godwit.procfs import source
from godwit.types import Pid


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount. Paths are as seen from the root directory of the process that was read."""

    mount_id: int
    parent_id: int
    dev_major: int
    dev_minor: int
    root: str  # the directory of the file system that is the root of this mount
    mount_point: str
    options: str  # of this mount
    propagation: tuple[str, ...]  # shared:N, master:N, propagate_from:N, unbindable
    fs_type: str
    source: str
    super_options: str  # of the file system


def _parse_line(line: str) -> Mount:
    # At single spaces: the source may be empty.
    words = line.split(" ")
    try:
        dash = words.index("-", 6)
        fs_type, origin, *super_options = words[dash + 1 :]
        major, minor = words[2].split(":")
        return Mount(
            mount_id=int(words[0]),
            parent_id=int(words[1]),
            dev_major=int(major),
            dev_minor=int(minor),
            root=source.unescape_octal(words[3]),
            mount_point=source.unescape_octal(words[4]),
            options=source.unescape_octal(words[5]),
            propagation=tuple(words[6:dash]),
            fs_type=source.unescape_octal(fs_type),
            source=source.unescape_octal(origin),
            super_options=source.unescape_octal(" ".join(super_options)),
        )
    except ValueError:
        raise source.malformed("mountinfo", "no mount", line) from None


def parse(text: str) -> tuple[Mount, ...]:
    """Read all mounts, parents first. Raises ValueError with the line that is wrong."""
    return tuple(_parse_line(line) for line in source.lines(text))


def read(pid: Pid, *, proc: str = source.PROC) -> tuple[Mount, ...]:
    """Read the mounts of a process. Raises ProcessLookupError if it is gone or a zombie."""
    try:
        return parse(source.read_text(pid, "mountinfo", proc=proc))
    except OSError as error:
        # A zombie has left its mount namespace: EINVAL.
        if error.errno == errno.EINVAL:
            raise source.gone(source.task_path(pid, None, proc)) from None
        raise
