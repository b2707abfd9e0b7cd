"""What can go wrong, sorted by what a caller can do about it.

Each class carries the exit status that the command line returns for it; `docs/errors.md` lists
them. A message says what, where and why; `remedy` says what to do.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class Survivor(enum.StrEnum):
    """Which copy of the program runs after a failed move."""

    SOURCE = "source"
    DESTINATION = "destination"
    UNDECIDED = "undecided"


class GodwitError(Exception):
    """The root of every error raised on purpose."""

    exit_status: ClassVar[int] = 70  # EX_SOFTWARE: report a bug

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def line(self) -> str:
        """One line for people: the message, then the remedy."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class InternalError(GodwitError):
    """A promise we made ourselves is broken: report a bug."""


class RequestError(GodwitError):
    """The request itself is wrong: fix it."""

    exit_status = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One thing that cannot be carried: what, where, why, and the remedy."""

    what: str
    where: str
    why: str
    remedy: str = ""

    def line(self) -> str:
        """One line for people."""
        tail = f"; {self.remedy}" if self.remedy else ""
        return f"{self.where}: {self.what}: {self.why}{tail}"


class RefusedError(GodwitError):
    """The process holds what this Godwit cannot carry; nothing was changed."""

    exit_status = 3

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        first = self.refusals[0].line() if self.refusals else "refused"
        more = len(self.refusals) - 1
        super().__init__(first + (f" (and {more} more: see godwit check)" if more > 0 else ""))


class UnsupportedStateError(RefusedError):
    """One holding is in a state that cannot be carried. Raised where it is found."""

    def __init__(self, what: str, *, where: str, why: str, remedy: str = "") -> None:
        super().__init__([Refusal(what=what, where=where, why=why, remedy=remedy)])


class AccessError(GodwitError):
    """We may not touch the process or the machine: become somebody who may."""

    exit_status = 4


class NoProcessError(GodwitError):
    """There is no such process (any more)."""

    exit_status = 5


class ImageError(GodwitError):
    """An image or a stream from a peer is damaged, foreign or dishonest; nothing was built."""

    exit_status = 6


class DestinationError(GodwitError):
    """The destination cannot take the process: choose another machine, or make room."""

    exit_status = 7


class BusyError(GodwitError):
    """Something is in the way that may go away: a taken pid, another tracer. Wait and retry."""

    exit_status = 8


class MigrationError(GodwitError):
    """A move failed after it had begun. `survivor` says which copy lives."""

    exit_status = 9

    def __init__(self, message: str, *, survivor: Survivor, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.survivor = survivor

    def line(self) -> str:
        """One line for people, with the survivor named."""
        return f"{super().line()} (survivor: {self.survivor.value})"
