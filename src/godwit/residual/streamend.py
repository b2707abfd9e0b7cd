"""The local descriptor of a stream: read and written without ever waiting, and without O_NONBLOCK.

At home the open file description is shared with others, who would see that flag. So every call says by
itself that it must not wait: RWF_NOWAIT of preadv2(2) and pwritev2(2) for pipes, MSG_DONTWAIT of recv(2) and
send(2) for sockets. What was opened by a name, if only that of /proc/self/fd, is without the former: it is
opened once more, for an open file description of our own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
from typing import Protocol

from godwit.errors import UnsupportedStateError
from godwit.linux import tty
from godwit.types import OwnedFd


class StreamEnd(Protocol):
    """One descriptor of ours, for one direction or two."""

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        ...

    def idle_events(self, *, reading: bool) -> int | None:
        """Return what to poll for while there is nothing to write: None, not at all."""
        ...

    def receive(self, buffer: memoryview) -> int | None:
        """Take what is there; return how much: 0 at its end, None if nothing is there now."""
        ...

    def give(self, data: memoryview) -> int:
        """Hand on what fits now; return how much. Raises OSError if nobody will read it."""
        ...

    def end_output(self) -> None:
        """Let who reads see the end."""
        ...

    def end_input(self) -> None:
        """Let who writes see that nobody reads."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class PipeEnd:
    """One end of a pipe or FIFO. The other side sees its end when the last copy is closed."""

    def __init__(self, fd: OwnedFd) -> None:
        self._fd = fd
        self._again: OwnedFd | None = None
        self._flags = os.RWF_NOWAIT

    def _open_again(self) -> None:
        """Have an open file description of our own. Raises OSError: ENXIO, nobody reads what we write."""
        access = fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE
        path = f"/proc/self/fd/{self._fd.number}"
        self._again = OwnedFd(os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC))
        self._flags = 0

    @property
    def _io(self) -> int:
        return self._fd.number if self._again is None else self._again.number

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._fd.number

    def idle_events(self, *, reading: bool) -> int | None:
        """Return what to poll for while there is nothing to write: that the reader goes away, is an error."""
        return None if reading else select.EPOLLERR

    def receive(self, buffer: memoryview) -> int | None:
        """Take what is there; return how much: 0 at its end, None if nothing is there now."""
        try:
            return os.preadv(self._io, [buffer], -1, self._flags)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        self._open_again()
        return self.receive(buffer)

    def give(self, data: memoryview) -> int:
        """Hand on what fits now; return how much. Raises BrokenPipeError if nobody will read it."""
        try:
            return os.pwritev(self._io, [data], -1, self._flags)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        self._open_again()
        return self.give(data)

    def end_output(self) -> None:
        """Let who reads see the end: by `close`."""

    def end_input(self) -> None:
        """Let who writes see that nobody reads: by `close`."""

    def close(self) -> None:
        """Close it."""
        self._fd.close()
        if self._again is not None:
            self._again.close()


class TerminalEnd:
    """A terminal, or the master of a pseudoterminal, which gives the end when no slave is open any more."""

    def __init__(self, fd: OwnedFd) -> None:
        if tty.is_master(fd.number):
            # Nobody shares it. To open it again would make another pair.
            os.set_blocking(fd.number, False)
            self._fd = fd
            return
        path = f"/proc/self/fd/{fd.number}"
        self._fd = OwnedFd(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
        fd.close()

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._fd.number

    def idle_events(self, *, reading: bool) -> int | None:  # noqa: ARG002  # pipes ask
        """Return what to poll for while there is nothing to write: a hang-up would be told for ever."""
        return None

    def receive(self, buffer: memoryview) -> int | None:
        """Take what is there; return how much: 0 at its end, None if nothing is there now."""
        try:
            return os.readv(self._fd.number, [buffer])
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EIO:
                return 0
            raise

    def give(self, data: memoryview) -> int:
        """Hand on what fits now; return how much. Raises OSError: it was hung up."""
        try:
            return os.write(self._fd.number, data)
        except BlockingIOError:
            return 0

    def end_output(self) -> None:
        """A terminal has no ends of its own: who is hung up gets SIGHUP."""

    def end_input(self) -> None:
        """The same."""

    def close(self) -> None:
        """Close it."""
        self._fd.close()


class SocketEnd:
    """A connected stream socket. Its shutdowns are those of the open file description."""

    def __init__(self, fd: OwnedFd) -> None:
        self._socket = socket.socket(fileno=fd.detach())

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def idle_events(self, *, reading: bool) -> int | None:  # noqa: ARG002  # pipes ask
        """Return what to poll for while there is nothing to write: a hang-up would be told for ever."""
        return None

    def receive(self, buffer: memoryview) -> int | None:
        """Take what is there; return how much: 0 at its end, None if nothing is there now."""
        try:
            return self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionError:
            return 0

    def give(self, data: memoryview) -> int:
        """Hand on what fits now; return how much. Raises OSError if nobody will read it."""
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def end_output(self) -> None:
        """Let who reads see the end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def end_input(self) -> None:
        """Let who writes see that nobody reads."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close it."""
        self._socket.close()


def stream_end(fd: OwnedFd) -> StreamEnd:
    """Take a descriptor as the local end of a stream.

    Raises:
        UnsupportedStateError: It is neither a pipe, nor a stream socket, nor a terminal.
    """
    mode = os.fstat(fd.number).st_mode
    if stat.S_ISFIFO(mode):
        return PipeEnd(fd.release())
    if stat.S_ISCHR(mode) and os.isatty(fd.number):
        return TerminalEnd(fd.release())
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(fd.number)) as probe:
            kind = probe.type
        if kind == socket.SOCK_STREAM:
            return SocketEnd(fd.release())
    raise UnsupportedStateError(
        "descriptor", where=f"fd {fd.number}", why="only pipes, stream sockets and terminals can be reached"
    )
