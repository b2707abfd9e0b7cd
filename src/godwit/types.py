"""Numbers that must not be mixed, and the descriptor that closes itself."""

from __future__ import annotations

import os
from types import TracebackType
from typing import NewType, Self

Pid = NewType("Pid", int)
"""A thread group id, in the pid namespace of the caller unless the name says otherwise."""

Tid = NewType("Tid", int)
"""A thread id, in the pid namespace of the caller unless the name says otherwise."""

Fd = NewType("Fd", int)
"""A descriptor number somebody else owns: only being looked at."""

RemoteAddr = NewType("RemoteAddr", int)
"""An address in another process."""

FileId = NewType("FileId", int)
"""An open file description, numbered within one image from 1."""

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


def page_floor(address: int) -> int:
    """Return the start of the page that holds `address`."""
    return address & ~(PAGE_SIZE - 1)


def page_ceil(address: int) -> int:
    """Return the first page boundary at or above `address`."""
    return (address + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


class OwnedFd:
    """A descriptor of ours. Whoever takes it closes it: `with` does, unless `release` hands it on."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def number(self) -> Fd:
        """The descriptor's number. Raises ValueError once closed or released."""
        if self._number < 0:
            raise ValueError("descriptor is closed")
        return Fd(self._number)

    def fileno(self) -> int:
        """Return the number, for the standard library's `fileno` protocol."""
        return self.number

    def release(self) -> OwnedFd:
        """Hand the descriptor on: a new owner holds it, and this one closes nothing."""
        heir = OwnedFd(self.number)
        self._number = -1
        return heir

    def detach(self) -> int:
        """Give the bare number away for good."""
        number = self.number
        self._number = -1
        return number

    def close(self) -> None:
        """Close once; closing again does nothing."""
        if self._number >= 0:
            number, self._number = self._number, -1
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._number})"
