"""What every Python workload shares: signs of life and the verdict. The twin of `c/common.c`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

MARKER_BYTES = 16


class BadError(Exception):
    """The program has noticed a change it did not make."""


def check(condition: bool, message: str) -> None:
    """Raise `BadError` with the message unless the condition holds."""
    if not condition:
        raise BadError(message)


def nap(length_s: float) -> None:
    """Sleep, and notice a sleep that ends early. PEP 475 hides EINTR here; `calls_c` looks for it."""
    end = time.monotonic() + length_s
    time.sleep(length_s)
    check(time.monotonic() >= end, "time.sleep came back early")


def marker(index: int) -> int:
    """Byte `index` of the marker by which a test finds the state in memory from outside."""
    return (index * 37 + 11) & 255


class Life:
    """Counts units of work in `alive` and in a log whose numbers must have no gap and no double."""

    def __init__(self, directory: str) -> None:
        os.chdir(directory)
        self.count = 0
        self._pid = os.getpid()
        self._alive = os.open("alive", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        # No O_APPEND: a file offset that is lost shows as a gap or an overlap.
        self._log = os.open("log", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def alive(self) -> None:
        """One more unit of work is done."""
        self.count += 1
        line = b"%020d\n" % self.count
        check(os.write(self._log, line) == len(line), "log: short write")
        check(os.pwrite(self._alive, line, 0) == len(line), "alive: short write")
        check(os.getpid() == self._pid, f"pid was {self._pid}, is {os.getpid()}")

    def stopping(self) -> bool:
        """Tell whether we were asked to end."""
        return os.path.exists("stop")

    def verify_log(self) -> None:
        """Raise unless the log holds each number once and in order."""
        lines = Path("log").read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            check(line == b"%020d\n" % number, f"log: line {number} is {line!r}")
        check(len(lines) == self.count, f"log has {len(lines)} lines, {self.count} were written")


def give_verdict(text: str) -> None:
    """Write the result in one step: a reader finds all of it or nothing."""
    name = f"result.{os.getpid()}"
    Path(name).write_text(text + "\n")
    os.replace(name, "result")


def conclude(life: Life, work: Callable[[Life], str]) -> NoReturn:
    """Run `work(life)`, which returns a summary, and end with the verdict."""
    try:
        summary = work(life)
        life.verify_log()
    except (BadError, OSError, ValueError, ArithmeticError, LookupError, EOFError) as error:
        give_verdict(f"bad: {type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(1)
    give_verdict(f"ok {summary}")
    sys.stdout.flush()
    os._exit(0)
