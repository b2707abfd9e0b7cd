"""What all sockets have in common: which one it is, and its options: socket(7)."""

from __future__ import annotations

import errno
import select
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from godwit.errors import DestinationError, ImageError
from godwit.linux import sockopt
from godwit.resources.base import OpenFile
from godwit.types import Fd

SO_PROTOCOL = 38
SO_PEEK_OFF = 42
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_PASSSEC = 34
SO_BUF_LOCK = 72
SO_PASSPIDFD = 76

_SOL = socket.SOL_SOCKET
_INT = struct.Struct("=i")
_VALUE_BYTES = 64
_UNKNOWN = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)

# Numbers the standard library does not name are those of asm-generic/socket.h.
COMMON: tuple[tuple[int, int], ...] = (
    (_SOL, socket.SO_REUSEADDR),
    (_SOL, socket.SO_REUSEPORT),
    (_SOL, socket.SO_BROADCAST),
    (_SOL, socket.SO_DONTROUTE),
    (_SOL, socket.SO_KEEPALIVE),
    (_SOL, socket.SO_OOBINLINE),
    (_SOL, 11),  # SO_NO_CHECK
    (_SOL, socket.SO_PRIORITY),
    (_SOL, socket.SO_LINGER),
    (_SOL, socket.SO_PASSCRED),
    (_SOL, SO_PASSSEC),
    (_SOL, SO_PASSPIDFD),
    (_SOL, socket.SO_RCVLOWAT),
    (_SOL, socket.SO_RCVTIMEO),
    (_SOL, socket.SO_SNDTIMEO),
    (_SOL, 29),  # SO_TIMESTAMP
    (_SOL, 35),  # SO_TIMESTAMPNS
    (_SOL, 37),  # SO_TIMESTAMPING
    (_SOL, 63),  # SO_TIMESTAMP_NEW
    (_SOL, 64),  # SO_TIMESTAMPNS_NEW
    (_SOL, 65),  # SO_TIMESTAMPING_NEW
    (_SOL, socket.SO_MARK),
    (_SOL, 40),  # SO_RXQ_OVFL
    (_SOL, 41),  # SO_WIFI_STATUS
    (_SOL, 43),  # SO_NOFCS
    (_SOL, 45),  # SO_SELECT_ERR_QUEUE
    (_SOL, 46),  # SO_BUSY_POLL
    (_SOL, 60),  # SO_ZEROCOPY
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOption:
    """One option of a socket, as getsockopt(2) gives and setsockopt(2) takes it."""

    level: int
    name: int
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """The options of a socket in an image."""

    plain: tuple[SocketOption, ...]
    send_buffer_bytes: int  # SO_SNDBUF as the kernel keeps it, twice what was asked for
    receive_buffer_bytes: int
    buffer_locks: int  # SO_BUF_LOCK: which of the two the program has set; -1: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which socket it is."""

    family: int
    kind: int  # SOCK_*
    protocol: int


def borrow(file: OpenFile) -> socket.socket:
    """Return a socket object on a descriptor of ours for the same socket."""
    with file.duplicate() as fd:
        found = identify_fd(fd.number)
        return socket.socket(found.family, found.kind, found.protocol, fileno=fd.detach())


def identify_fd(fd: int) -> Identity:
    """Ask a socket what it is."""
    # Dup'ed, since a socket object closes what it is given.
    with socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        family = probe.getsockopt(_SOL, socket.SO_DOMAIN)
        kind = probe.getsockopt(_SOL, socket.SO_TYPE)
        return Identity(family=family, kind=kind, protocol=probe.getsockopt(_SOL, SO_PROTOCOL))


def identify(file: OpenFile) -> Identity | None:
    """Ask an open file which socket it is. None: it is no socket, or went away meanwhile."""
    if not stat.S_ISSOCK(file.mode) or not file.link.startswith("socket:["):
        return None
    try:
        with file.duplicate() as fd:
            return identify_fd(fd.number)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ESRCH, errno.ENOTSOCK):
            raise
        return None


def number_of(sock: socket.socket) -> Fd:
    """Return the socket's descriptor, which stays the socket's."""
    return Fd(sock.fileno())


def has_error(sock: socket.socket) -> bool:
    """Tell whether an error waits for the next call, without taking it: SO_ERROR would."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def has_filter(sock: socket.socket) -> bool:
    """Tell whether a packet filter is attached, which is not carried."""
    try:
        return sockopt.filter_instructions(number_of(sock)) > 0
    except PermissionError:
        return True  # one that cannot even be read
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return False


def collect(sock: socket.socket, more: Iterable[tuple[int, int]] = ()) -> SocketOptions:
    """Read all options that this kind of socket has."""
    plain: list[SocketOption] = []
    for level, name in (*COMMON, *more):
        value = _get(sock, level, name)
        if value is not None:
            plain.append(SocketOption(level=level, name=name, value=value))
    locks = _get(sock, _SOL, SO_BUF_LOCK)
    return SocketOptions(
        plain=tuple(plain),
        send_buffer_bytes=sock.getsockopt(_SOL, socket.SO_SNDBUF),
        receive_buffer_bytes=sock.getsockopt(_SOL, socket.SO_RCVBUF),
        buffer_locks=-1 if locks is None else _INT.unpack(locks)[0],
    )


def _get(sock: socket.socket, level: int, name: int) -> bytes | None:
    try:
        return sock.getsockopt(level, name, _VALUE_BYTES)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return None


def restore(sock: socket.socket, options: SocketOptions, more: Iterable[tuple[int, int]] = ()) -> None:
    """Set every option that differs from what a new socket has."""
    known = {*COMMON, *more}
    for option in options.plain:
        if (option.level, option.name) not in known or len(option.value) > _VALUE_BYTES:
            raise ImageError(f"socket option {option.name} of level {option.level} is not known here")
        if _get(sock, option.level, option.name) != option.value:
            _set(sock, option)
    _restore_buffers(sock, options)


def _set(sock: socket.socket, option: SocketOption) -> None:
    try:
        sock.setsockopt(option.level, option.name, option.value)
    except OSError as error:
        raise DestinationError(
            f"cannot set socket option {option.name} of level {option.level}: {error.strerror}"
        ) from error


def _restore_buffers(sock: socket.socket, options: SocketOptions) -> None:
    wanted: Sequence[tuple[int, int, int]] = (
        (socket.SO_SNDBUF, SO_SNDBUFFORCE, options.send_buffer_bytes),
        (socket.SO_RCVBUF, SO_RCVBUFFORCE, options.receive_buffer_bytes),
    )
    for name, force, length_bytes in wanted:
        if sock.getsockopt(_SOL, name) != length_bytes:
            set_buffer(sock, name, force, length_bytes // 2)
    if options.buffer_locks >= 0 and _get(sock, _SOL, SO_BUF_LOCK) != _INT.pack(options.buffer_locks):
        sock.setsockopt(_SOL, SO_BUF_LOCK, options.buffer_locks)


def set_buffer(sock: socket.socket, name: int, force: int, half_bytes: int) -> None:
    """Set a buffer's length, beyond the system's limit if we may. The kernel doubles the number."""
    if not 0 <= half_bytes < 2**30:
        raise ImageError(f"a socket buffer of {half_bytes * 2} bytes is not possible")
    try:
        sock.setsockopt(_SOL, force, half_bytes)
    except PermissionError:
        sock.setsockopt(_SOL, name, half_bytes)
