"""Terminals: ioctl_tty(2), TCGETS2TCSETS2(2const), termios(3), pty(7)."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from dataclasses import dataclass, replace

from godwit.types import Fd, OwnedFd

TCGETS2 = 0x802C542A
TCSETS2 = 0x402C542B
TCSETSW2 = 0x402C542C
TIOCGPTN = 0x80045430

_TERMIOS2 = struct.Struct("=4IB19s2I")
_WINSIZE = struct.Struct("=4H")


@dataclass(frozen=True, slots=True, kw_only=True)
class Termios:
    """Struct termios2: the settings of a line."""

    c_iflag: int
    c_oflag: int
    c_cflag: int
    c_lflag: int
    c_line: int
    c_cc: bytes  # 19
    c_ispeed: int
    c_ospeed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WinSize:
    """Struct winsize."""

    ws_row: int
    ws_col: int
    ws_xpixel: int = 0
    ws_ypixel: int = 0


def get_attributes(fd: Fd) -> Termios:
    """Return the line's settings. Raises OSError: ENOTTY, it is no terminal; EIO, it was hung up."""
    iflag, oflag, cflag, lflag, line, cc, ispeed, ospeed = _TERMIOS2.unpack(
        fcntl.ioctl(fd, TCGETS2, bytes(_TERMIOS2.size))
    )
    return Termios(
        c_iflag=iflag,
        c_oflag=oflag,
        c_cflag=cflag,
        c_lflag=lflag,
        c_line=line,
        c_cc=cc,
        c_ispeed=ispeed,
        c_ospeed=ospeed,
    )


def set_attributes(fd: Fd, wanted: Termios, *, drain: bool = False) -> None:
    """Set the line's settings, at once or when all output has left it.

    A process of the terminal's own session that is in the background is stopped by SIGTTOU; others are not.
    """
    raw = _TERMIOS2.pack(
        wanted.c_iflag,
        wanted.c_oflag,
        wanted.c_cflag,
        wanted.c_lflag,
        wanted.c_line,
        wanted.c_cc,
        wanted.c_ispeed,
        wanted.c_ospeed,
    )
    fcntl.ioctl(fd, TCSETSW2 if drain else TCSETS2, raw)


def raw(settings: Termios) -> Termios:
    """Return the settings with which every byte passes as it is: cfmakeraw of termios(3)."""
    cc = bytearray(settings.c_cc)
    cc[termios.VMIN], cc[termios.VTIME] = 1, 0
    iflag = (
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    lflag = termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN
    return replace(
        settings,
        c_iflag=settings.c_iflag & ~iflag,
        c_oflag=settings.c_oflag & ~termios.OPOST,
        c_lflag=settings.c_lflag & ~lflag,
        c_cflag=settings.c_cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8,
        c_cc=bytes(cc),
    )


def get_size(fd: Fd) -> WinSize:
    """Return the window's size."""
    return unpack_size(fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(_WINSIZE.size)))


def set_size(fd: Fd, size: WinSize) -> None:
    """Set the window's size; the foreground process group gets SIGWINCH if it changes."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, pack_size(size))


def pack_size(size: WinSize) -> bytes:
    """Build a struct winsize."""
    return _WINSIZE.pack(size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel)


def unpack_size(raw_size: bytes) -> WinSize:
    """Read a struct winsize of 8 bytes."""
    row, col, xpixel, ypixel = _WINSIZE.unpack(raw_size)
    return WinSize(ws_row=row, ws_col=col, ws_xpixel=xpixel, ws_ypixel=ypixel)


def is_master(fd: Fd) -> bool:
    """Tell whether a terminal is the master's side of a pair."""
    try:
        fcntl.ioctl(fd, TIOCGPTN, bytes(4))
    except OSError:
        return False
    return True


def open_pair() -> tuple[OwnedFd, OwnedFd]:
    """Make a pseudoterminal; return master and slave, close-on-exec, nobody's controlling terminal yet."""
    master, slave = os.openpty()
    return OwnedFd(master), OwnedFd(slave)
