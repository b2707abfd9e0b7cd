"""The user's terminal, which stays at home while the program runs elsewhere.

At the host the program has a pseudoterminal of its own, whose line discipline does what a terminal does:
echo, ^C, ^Z, ^D. Home's terminal is raw meanwhile, so that every byte gets there; the same division of
labour as with ssh. The bytes are a stream (`streams`) whose local ends are the master at the host and the
terminal at home; size, stops and continuations are messages on a channel of their own.

What the integrator arranges at the host: a session leader that is no part of the program (the restore agent)
takes the slave as its controlling terminal (setsid(2), TIOCSCTTY); the program is its child, in a process
group of its own, which it makes the foreground group (tcsetpgrp(3), with SIGTTOU ignored). Were the program
itself the session leader, its group would be orphaned, and SIGTSTP, SIGTTIN and SIGTTOU would not stop it.
The agent waits with WUNTRACED and calls `HostTerminal.stopped`.

At home the keeper is outside of the terminal's session, so that no job control holds it back; therefore it
looks itself whether the deputy's group is in the foreground, in /proc, since tcgetpgrp(3) is not for
outsiders. On `on_stopped` the integrator stops the deputy, and when the deputy is continued it calls
`HomeTerminal.continued`. A hang-up comes to the deputy as SIGHUP and goes to the program like any signal.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from godwit.images import codec
from godwit.linux import tty
from godwit.linux.tty import Termios, WinSize
from godwit.procfs import stat
from godwit.residual.link import Link, LinkClosedError
from godwit.residual.streams import Streams
from godwit.types import Fd, OwnedFd, Pid
from godwit.wire.linkframes import ProtocolError

_LOOK_S: Final = 0.1
_SIZE_BYTES: Final = 8
_SIGNALS: Final = 64


class TerminalWord(enum.IntEnum):
    """What is said besides the bytes. A number, once released, keeps its meaning."""

    SIZE = 1  # home: struct winsize, little-endian
    STOPPED = 2  # host: the program was stopped, by the signal that follows in one byte
    CONTINUE = 3  # home: it is to go on


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalLine:
    """Over what the two ends of a terminal talk."""

    link: Link  # carries the messages
    channel: int  # the terminal's own
    streams: Streams  # carry the bytes
    stream_id: int

    def say(self, word: TerminalWord, rest: bytes = b"", *, wait: bool = True) -> None:
        """Send a message."""
        self.link.send(self.channel, bytes([word]) + rest, wait=wait)


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalSettings:
    """What a program can ask its terminal, to be found again at the host."""

    attributes: Termios
    size: WinSize


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """What a keeper's successor needs to leave the user's terminal as it was."""

    path: str
    attributes: Termios


def read_settings(terminal: Fd) -> TerminalSettings:
    """Return what goes to the host. Raises OSError: it is no terminal, or was hung up."""
    return TerminalSettings(attributes=tty.get_attributes(terminal), size=tty.get_size(terminal))


def open_terminal(settings: TerminalSettings) -> tuple[OwnedFd, OwnedFd]:
    """Make the host's pseudoterminal; return master and slave, set like the user's terminal."""
    master, slave = tty.open_pair()
    tty.set_attributes(slave.number, settings.attributes)
    tty.set_size(slave.number, settings.size)
    return master, slave


def repair(saved: Path) -> None:
    """Put a terminal right that a keeper left raw when it died. Without such a note nothing is done."""
    with contextlib.suppress(FileNotFoundError):
        note = codec.decode(saved.read_bytes(), _Saved)
        with contextlib.suppress(OSError), OwnedFd(os.open(note.path, os.O_RDWR | os.O_NOCTTY)) as fd:
            tty.set_attributes(fd.number, note.attributes)
        saved.unlink(missing_ok=True)


class HostTerminal:
    """The host's end.

    Args:
        line: Over what it talks.
        master: Of the program's pseudoterminal. Ours from now on.
        on_continue: Called by the link's thread when the program is to go on.
    """

    def __init__(self, line: TerminalLine, master: OwnedFd, on_continue: Callable[[], None]) -> None:
        self._line = line
        self._master = OwnedFd(os.dup(master.number))
        self._on_continue = on_continue
        line.streams.open(line.stream_id, master, reads=True, writes=True)

    def handler(self, payload: memoryview) -> None:
        """Take a message of home's. Raises ProtocolError if it is none."""
        if len(payload) == 1 + _SIZE_BYTES and payload[0] == TerminalWord.SIZE:
            with contextlib.suppress(OSError):
                tty.set_size(self._master.number, tty.unpack_size(bytes(payload[1:])))
        elif len(payload) == 1 and payload[0] == TerminalWord.CONTINUE:
            self._on_continue()
        else:
            raise ProtocolError("a message about a terminal that is none")

    def stopped(self, signal: int) -> None:
        """Tell home that the program was stopped."""
        self._line.say(TerminalWord.STOPPED, bytes([signal]))

    def close(self) -> None:
        """Let go of the master; with the stream's copy closed the program's session gets SIGHUP."""
        self._master.close()


class HomeTerminal:
    """Home's end. While the deputy's process group is in the foreground the terminal is raw, else left alone.

    Args:
        line: Over what it talks.
        terminal: The user's. Ours from now on; its open file description may be shared.
        deputy: Whose controlling terminal it is.
        saved: Where to note how the terminal is to be left; see `repair`.
        on_stopped: Called by the link's thread, with the terminal as it was, when the program was stopped.
    """

    def __init__(
        self,
        line: TerminalLine,
        terminal: OwnedFd,
        deputy: Pid,
        saved: Path,
        on_stopped: Callable[[int], None],
    ) -> None:
        self._line = line
        self._terminal = terminal
        self._deputy = deputy
        self._saved = saved
        self._on_stopped = on_stopped
        self._changed = threading.Condition()
        self._before: Termios | None = None  # set while the terminal is raw
        self._size = tty.get_size(terminal.number)
        self._stopped = False
        self._closed = False
        line.streams.open(line.stream_id, OwnedFd(os.dup(terminal.number)), reads=True, writes=True)
        self._hold(held=True)
        self._look()
        self._watch = threading.Thread(target=self._keep_looking, name="terminal", daemon=True)
        self._watch.start()

    def handler(self, payload: memoryview) -> None:
        """Take a message of the host's. Raises ProtocolError if it is none."""
        if len(payload) != 2 or payload[0] != TerminalWord.STOPPED or not 0 < payload[1] <= _SIGNALS:
            raise ProtocolError("a message about a terminal that is none")
        with self._changed:
            self._stopped = True
            self._leave_raw()
        self._on_stopped(payload[1])

    def continued(self) -> None:
        """Let the program go on, as the deputy was; it reads the terminal if it is in the foreground."""
        with self._changed:
            self._stopped = False
            self._look()
        self._line.say(TerminalWord.CONTINUE)

    def look(self) -> None:
        """Look at foreground and size now, as at the deputy's SIGWINCH; else ten times a second."""
        with self._changed:
            self._look()

    def close(self) -> None:
        """Leave the terminal as it was."""
        with self._changed:
            self._closed = True
            self._leave_raw()
            self._changed.notify_all()
        self._watch.join()
        self._terminal.close()

    def _hold(self, *, held: bool) -> None:
        self._line.streams.hold(self._line.stream_id, held=held)

    def _keep_looking(self) -> None:
        with self._changed, contextlib.suppress(LinkClosedError, OSError):
            while not self._closed:
                self._look()
                self._changed.wait(_LOOK_S)

    def _look(self) -> None:
        foreground = not self._closed and not self._stopped and self._is_foreground()
        if foreground and self._before is None:
            self._make_raw()
        elif not foreground:
            self._leave_raw()
        size = tty.get_size(self._terminal.number)
        if size != self._size:
            self._size = size
            self._line.say(TerminalWord.SIZE, tty.pack_size(size), wait=False)

    def _is_foreground(self) -> bool:
        try:
            task = stat.read(self._deputy)
        except ProcessLookupError:
            return False
        return task.pgrp == task.tpgid

    def _make_raw(self) -> None:
        fd = self._terminal.number
        before = tty.get_attributes(fd)
        note = _Saved(path=os.readlink(f"/proc/self/fd/{fd}"), attributes=before)
        # Before the terminal is touched: who dies in between leaves a note that changes nothing.
        self._saved.write_bytes(codec.encode(note))
        tty.set_attributes(fd, tty.raw(before))
        self._before = before
        self._hold(held=False)

    def _leave_raw(self) -> None:
        if self._before is None:
            return
        self._hold(held=True)
        with contextlib.suppress(OSError):
            tty.set_attributes(self._terminal.number, self._before)
        self._before = None
        self._saved.unlink(missing_ok=True)
