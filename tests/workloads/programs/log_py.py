"""Append a numbered line every few milliseconds, through O_APPEND and through a buffer; read both back."""

from __future__ import annotations

import hashlib
import os
import sys

from life import Life, check, conclude, nap

LINES_PER_SYNC = 50


def line_of(number: int) -> bytes:
    """The only right content of a line."""
    return b"%012d %s\n" % (number, hashlib.sha256(b"%d" % number).hexdigest().encode())


def verify(name: str, written: int) -> None:
    """Raise unless the file holds each line once and in order."""
    with open(name, "rb") as file:
        number = 0
        for number, line in enumerate(file, start=1):
            check(line == line_of(number), f"{name}: line {number} is {line!r}")
    check(number == written, f"{name} has {number} lines, {written} were written")


def work(life: Life) -> str:
    """Write until told to stop, then verify."""
    number = 0
    appended = os.open("appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    with open("buffered", "wb") as buffered:
        while not life.stopping():
            number += 1
            line = line_of(number)
            check(os.write(appended, line) == len(line), "short write")
            # Stays in memory for some hundred lines, then reaches the file at the descriptor's offset.
            buffered.write(line)
            if number % LINES_PER_SYNC == 0:
                os.fsync(appended)
            life.alive()
            nap(0.003)
    os.close(appended)
    verify("appended", number)
    verify("buffered", number)
    return f"{number} lines"


if __name__ == "__main__":
    conclude(Life(sys.argv[1]), work)
