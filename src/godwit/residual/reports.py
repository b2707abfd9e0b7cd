"""What a deputy reports: a numbered siginfo_t for each signal, in the order in which it took them.

Reports stay in the deputy's socket until they are confirmed, so a keeper that dies between reading one and
passing it on loses nothing: the next one finds it again, with the same number. SO_PEEK_OFF in socket(7).
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import Final

from godwit.errors import InternalError
from godwit.linux import pidfd
from godwit.linux.ptrace import SIGINFO_BYTES
from godwit.residual.deputy import Deputy
from godwit.types import Fd

_SO_PEEK_OFF: Final = 42
_NUMBER: Final = struct.Struct("<Q")
_REPORT_BYTES: Final = _NUMBER.size + SIGINFO_BYTES


@dataclass(frozen=True, slots=True)
class Report:
    """A signal that came to a deputy."""

    number: int  # from 1, without gaps; whoever restarts may be told it twice
    info: bytes  # siginfo_t


class Reports:
    """The reading end of a deputy's socket. Never waits."""

    __slots__ = ("_socket", "_told")

    def __init__(self, reading: socket.socket) -> None:
        self._socket = reading
        self._told: deque[int] = deque()

    @classmethod
    def of(cls, deputy: Deputy) -> Reports:
        """Open a deputy's reports, from the oldest one that nobody has confirmed.

        Raises:
            ProcessLookupError: It is gone.
            OSError: EBADF, its descriptor was closed.
        """
        with pidfd.pidfd_open(deputy.pid) as process:
            reading = socket.socket(fileno=pidfd.pidfd_getfd(process.number, Fd(deputy.reports)).detach())
        reading.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        return cls(reading)

    def fileno(self) -> int:
        """Return the socket's number, to be polled edge-triggered: what is not confirmed stays readable."""
        return self._socket.fileno()

    def next(self) -> Report | None:
        """Return the oldest report not returned yet, or None."""
        try:
            raw = self._socket.recv(_REPORT_BYTES + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        if not raw:  # the deputy is gone
            return None
        if len(raw) != _REPORT_BYTES:
            raise InternalError(f"a deputy's report of {len(raw)} bytes")
        report = Report(_NUMBER.unpack_from(raw)[0], raw[_NUMBER.size :])
        self._told.append(report.number)
        return report

    def confirm(self, number: int) -> None:
        """Drop the reports up to this number for good: nobody needs to hear of them again."""
        while self._told and self._told[0] <= number:
            self._socket.recv(_REPORT_BYTES, socket.MSG_DONTWAIT)
            self._told.popleft()

    def close(self) -> None:
        """Close our end; the deputy goes on reporting."""
        self._socket.close()
