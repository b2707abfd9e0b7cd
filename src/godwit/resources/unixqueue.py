"""What waits in a unix socket, read without taking it away: SO_PEEK_OFF in socket(7), unix(7).

The kernel marks an empty datagram as seen at the first look, and skips it at a second one: of empty
messages in a queue that was looked at before, by the program or by a move that failed, nothing is
known any more.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct

from godwit.linux import sockdiag
from godwit.resources.base import OpenFile
from godwit.resources.sockets import SO_PASSPIDFD, SO_PASSSEC, SO_PEEK_OFF, has_error

_FIONREAD = 0x541B
_PIECE_BYTES = 1 << 20
# The most descriptors one message can carry is 253 (SCM_MAX_FD).
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * 253) + socket.CMSG_SPACE(12) + socket.CMSG_SPACE(256)
_WHAT = "unix socket"
_DRAIN = "let the program read it, then try again"


def unread(file: OpenFile, sock: socket.socket, shutdown: int) -> tuple[bytes, ...]:
    """Return what waits: a message each, or for a stream one piece with all of it.

    Args:
        file: The socket, for error messages.
        sock: Our duplicate of it.
        shutdown: RCV_SHUTDOWN and SEND_SHUTDOWN: once nothing more comes, an empty read is the end.

    Raises:
        UnsupportedStateError: Descriptors or credentials wait with the bytes.
    """
    offset_before = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        pieces = _peek_all(file, sock, shutdown)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset_before)
    if pieces and _passes_credentials(sock):
        raise file.refuse(_WHAT, "messages that tell who sent them wait in it", _DRAIN)
    if sock.type == socket.SOCK_STREAM:
        return (b"".join(pieces),) if pieces else ()
    return tuple(pieces)


def _passes_credentials(sock: socket.socket) -> bool:
    for name in (socket.SO_PASSCRED, SO_PASSSEC, SO_PASSPIDFD):
        try:
            if sock.getsockopt(socket.SOL_SOCKET, name):
                return True
        except OSError:
            continue  # this kernel has no such option, so it is off
    return False


def _peek_all(file: OpenFile, sock: socket.socket, shutdown: int) -> list[bytes]:
    waiting = _waiting_bytes(sock)
    if sock.type == socket.SOCK_STREAM:
        return _peek_stream(file, sock, waiting)
    if has_error(sock):
        # A message socket tells of an error before its messages, and even a peek takes the error away.
        if waiting:
            raise file.refuse(_WHAT, "an error waits in it before its messages", _DRAIN)
        return []
    pieces = _peek_messages(file, sock, None if shutdown & sockdiag.RCV_SHUTDOWN == 0 else waiting)
    if sock.type == socket.SOCK_SEQPACKET:
        _check_seen(file, sum(map(len, pieces)), waiting)
    return pieces


def _peek_stream(file: OpenFile, sock: socket.socket, waiting: int) -> list[bytes]:
    """Peek at all that waits, and not once more: a look at nothing takes a waiting error away."""
    pieces: list[bytes] = []
    seen = 0
    while seen < waiting:
        piece = _peek(file, sock)
        if not piece:
            break
        pieces.append(piece)
        seen += len(piece)
    _check_seen(file, seen, waiting)
    return pieces


def _peek_messages(file: OpenFile, sock: socket.socket, last_of_bytes: int | None) -> list[bytes]:
    """Peek at message after message.

    Args:
        file: For error messages.
        sock: Our duplicate.
        last_of_bytes: How many bytes wait, when nothing more comes: then the end reads like an empty
            message. None: more may come.
    """
    pieces: list[bytes] = []
    seen = 0
    while (piece := _peek(file, sock)) is not None:
        if not piece and sock.type == socket.SOCK_SEQPACKET and last_of_bytes == seen:
            break
        pieces.append(piece)
        seen += len(piece)
    return pieces


def _check_seen(file: OpenFile, seen: int, waiting: int) -> None:
    if seen != waiting:
        raise file.refuse(_WHAT, f"only {seen} of {waiting} bytes in it can be seen", _DRAIN)


def _waiting_bytes(sock: socket.socket) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), _FIONREAD, bytes(4)))[0]
    return count


def _peek(file: OpenFile, sock: socket.socket) -> bytes | None:
    """Return the next piece, or None when there is no more."""
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        piece, ancillary, told, _ = sock.recvmsg(_PIECE_BYTES, _ANCILLARY_BYTES, flags)
    except BlockingIOError:
        return None
    carries = _close_received(ancillary)
    if carries or told & socket.MSG_CTRUNC:
        raise file.refuse(_WHAT, "open files wait in it (SCM_RIGHTS)", _DRAIN)
    if told & socket.MSG_TRUNC:
        raise file.refuse(_WHAT, f"a message of more than {_PIECE_BYTES} bytes waits in it", _DRAIN)
    return piece


def _close_received(ancillary: list[tuple[int, int, bytes]]) -> bool:
    """Close descriptors that came along; tell whether there were any."""
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    for number in numbers:
        os.close(number)
    return bool(numbers)
