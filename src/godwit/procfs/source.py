"""Getting at the files of /proc, and the two notations they share.

Names and paths are bytes to the kernel. They are decoded as UTF-8 with surrogate escapes, so
`os.fsencode` gives the bytes back.
"""

from __future__ import annotations

import errno
import os
import re

from godwit.types import Pid, Tid

PROC = "/proc"

_COMM_ESCAPE = re.compile(r"\\([n\\])")


def task_path(pid: Pid, tid: Tid | None, proc: str) -> str:
    """Name the directory of a process, or of one of its threads."""
    return f"{proc}/{pid}" if tid is None else f"{proc}/{pid}/task/{tid}"


def gone(directory: str) -> ProcessLookupError:
    """Make the error for a task that has left, whichever errno said so."""
    return ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), directory)


def read_bytes(pid: Pid, name: str, *, tid: Tid | None = None, proc: str = PROC) -> bytes:
    """Read a whole file of a task's directory.

    Raises:
        ProcessLookupError: There is no such task, or it left while we read.
        FileNotFoundError: The task is there, but has no such file.
    """
    directory = task_path(pid, tid, proc)
    try:
        with open(f"{directory}/{name}", "rb", buffering=0) as file:
            return file.readall()
    except FileNotFoundError:
        if os.path.isdir(directory):
            raise
        raise gone(directory) from None


def read_text(pid: Pid, name: str, *, tid: Tid | None = None, proc: str = PROC) -> str:
    """Read a whole file of a task's directory as text. Raises as `read_bytes` does."""
    return decode(read_bytes(pid, name, tid=tid, proc=proc))


def decode(raw: bytes) -> str:
    """Turn bytes of the kernel into text that `os.fsencode` turns back."""
    return raw.decode("utf-8", "surrogateescape")


def lines(text: str) -> list[str]:
    """Split at newlines only: `str.splitlines` would also split names at a form feed."""
    return [line for line in text.split("\n") if line]


def malformed(file: str, what: str, text: str) -> ValueError:
    """Make the error for text that no kernel we know of writes."""
    return ValueError(f"{file}: {what}: {text[:120]!r}")


def number(file: str, what: str, text: str, base: int = 10) -> int:
    """Read one number. Raises ValueError that says which one."""
    try:
        return int(text, base)
    except ValueError:
        raise malformed(file, f"{what} is no number", text) from None


def unescape_octal(text: str) -> str:
    r"""Undo the kernel's `\ooo` for space, tab, newline, backslash and hash in mountinfo."""
    if "\\" not in text:
        return text
    raw = re.sub(rb"\\([0-3][0-7]{2})", lambda found: bytes([int(found[1], 8)]), os.fsencode(text))
    return decode(raw)


def unescape_comm(text: str) -> str:
    r"""Undo the kernel's `\n` and `\\` in the name of a task in status; stat does not escape."""
    return _COMM_ESCAPE.sub(lambda found: "\n" if found[1] == "n" else "\\", text)
