"""Pairs of unix sockets, both of whose ends are in the tree: socketpair(2), unix(7).

One entry holds the pair: what waits in either direction, how far it is shut down, the options. An
end may be closed already; the other then still reads what is left. Sockets with names, listening
ones and those connected to somebody else are refused. SO_PEERCRED keeps user and group; its process
id becomes that of who restored the pair.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import DestinationError, ImageError
from godwit.linux import peercred, sockdiag
from godwit.linux.sockdiag import UnixSocket
from godwit.resources import sockets, unixqueue
from godwit.resources.base import (
    FileKind,
    Finding,
    OpenFile,
    RestoreContext,
    Tree,
    moves,
    refuse_outside_holders,
)
from godwit.resources.sockets import SO_PEEK_OFF, SO_SNDBUFFORCE, SocketOptions
from godwit.types import FileId, OwnedFd

_WHAT = "unix socket"
_NAMELESS = "have the program use TCP, or pairs of socketpair(2)"
_KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
_MORE = ((socket.SOL_SOCKET, SO_PEEK_OFF),)
_FILL_BUFFER_BYTES = 2**29


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixEnd:
    """One end of a pair."""

    file_id: FileId
    options: SocketOptions
    shutdown: int  # RCV_SHUTDOWN 1, SEND_SHUTDOWN 2
    unread: tuple[bytes, ...]  # what this end reads next: messages, or for a stream one piece
    error: bool  # the peer was closed with bytes unread, and this end was not yet told


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixPairEntry:
    """A pair of unix sockets in an image, or what is left of one."""

    kind: int  # SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
    connected: bool  # False: one socket that was never connected
    ends: tuple[UnixEnd, ...]  # 2, or 1 when the other is closed or there never was one
    uid: int  # of who made the pair, as SO_PEERCRED tells
    gid: int

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open files this restores."""
        return tuple(end.file_id for end in self.ends)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    identity = sockets.identify(file)
    return identity is not None and identity.family == socket.AF_UNIX


def _look_up(file: OpenFile) -> UnixSocket:
    with sockets.borrow(file) as sock:
        return sockdiag.unix_socket(file.inode, sockets.number_of(sock))


def _check(file: OpenFile, tree: Tree) -> tuple[UnixSocket, OpenFile | None]:
    """Return the socket and its peer in the tree; refuse what has no peer that moves along."""
    found = _look_up(file)
    if found.state == sockdiag.TCP_LISTEN:
        raise file.refuse(
            f"{_WHAT} {_named(found)}", "it listens, and its clients would not find it", _NAMELESS
        )
    if found.name is not None:
        raise file.refuse(f"{_WHAT} {_named(found)}", "sockets with a name are not carried", _NAMELESS)
    refuse_outside_holders(file, tree, _WHAT)
    if not found.peer:
        return found, None
    peer = next((other for other in tree.files if other.link == f"socket:[{found.peer}]"), None)
    if peer is None:
        raise _outside_peer(file, found.peer, tree)
    theirs = _look_up(peer)
    if theirs.peer != found.inode or theirs.name is not None:
        raise file.refuse(
            f"{_WHAT} connected to {_named(theirs)}", "it is not one of a pair", "close the connection"
        )
    return found, peer


def _named(found: UnixSocket) -> str:
    name = found.name or b""
    abstract = name.startswith(b"\0")
    text = name.strip(b"\0").decode(errors="replace")
    return f"@{text}" if abstract else text or "without a name"


def _outside_peer(file: OpenFile, peer: int, tree: Tree) -> Exception:
    outside = tree.outside_holders(f"socket:[{peer}]")
    if not outside:
        return file.refuse(
            _WHAT,
            "its other end is open in no process we can see, perhaps on its way in a message",
            "let the program receive it, then try again",
        )
    pid, fd = outside[0]
    return file.refuse(
        _WHAT,
        f"it is connected to pid {pid} (fd {fd}), which does not move along",
        f"move a process that is an ancestor of pid {pid} too, or end pid {pid}",
    )


def inspect(file: OpenFile, tree: Tree) -> Finding:
    """Find that it moves, if the other end does."""

    def check() -> None:
        _check(file, tree)

    return moves(file, _WHAT, check)


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[UnixPairEntry]:
    """Note every pair once; nothing is taken out of it."""
    entries: list[UnixPairEntry] = []
    done: set[FileId] = set()
    for file in files:
        if file.file_id in done:
            continue
        found, peer = _check(file, tree)
        ends = [_end(file, found)]
        if peer is not None and peer.file_id != file.file_id:
            ends.append(_end(peer, _look_up(peer)))
        done.update(end.file_id for end in ends)
        uid, gid = _maker(file)
        entries.append(
            UnixPairEntry(
                kind=found.kind, connected=found.peer is not None, ends=tuple(ends), uid=uid, gid=gid
            )
        )
    return entries


def _maker(file: OpenFile) -> tuple[int, int]:
    with sockets.borrow(file) as sock:
        return peercred.peer_ids(sock)


def _end(file: OpenFile, found: UnixSocket) -> UnixEnd:
    with sockets.borrow(file) as sock:
        if sockets.has_filter(sock):
            raise file.refuse(_WHAT, "a packet filter is attached to it", "detach the filter")
        return UnixEnd(
            file_id=file.file_id,
            options=sockets.collect(sock, _MORE),
            shutdown=found.shutdown,
            unread=() if found.peer is None else unixqueue.unread(file, sock, found.shutdown),
            error=sockets.has_error(sock),
        )


def restore(entry: UnixPairEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:  # noqa: ARG001
    """Make the pair, let each end send what waits at the other, then shut down and close as it was."""
    _check_entry(entry)
    kind = socket.SocketKind(entry.kind)
    if not entry.connected:
        with socket.socket(socket.AF_UNIX, kind) as single:
            _shut_down(single, entry.ends[0].shutdown)
            return _finish(entry, (single,))
    left, right = _make_pair(entry, kind)
    with left, right:
        if len(entry.ends) == 1:
            return _restore_survivor(entry, left, right)
        for sender, end in ((right, entry.ends[0]), (left, entry.ends[1])):
            _send(sender, entry, end)
        for sock, end in ((left, entry.ends[0]), (right, entry.ends[1])):
            _shut_down(sock, end.shutdown)
        return _finish(entry, (left, right))


def _make_pair(entry: UnixPairEntry, kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    try:
        return peercred.socketpair_as(entry.uid, entry.gid, kind)
    except OSError as error:
        raise DestinationError(
            f"cannot make sockets of user {entry.uid} and group {entry.gid}: {error.strerror}",
            remedy="run Godwit as root at the destination",
        ) from error


def _check_entry(entry: UnixPairEntry) -> None:
    most = 2 if entry.connected else 1
    if entry.kind not in _KINDS or not 1 <= len(entry.ends) <= most:
        raise ImageError(f"unix sockets {entry.file_ids} are no pair")
    if not (0 <= entry.uid < 2**32 and 0 <= entry.gid < 2**32):
        raise ImageError(f"unix sockets {entry.file_ids} are of the impossible user {entry.uid}:{entry.gid}")
    if not entry.connected and any(end.unread for end in entry.ends):
        raise ImageError(f"unix socket {entry.file_ids} was never connected and yet holds data")


def _restore_survivor(
    entry: UnixPairEntry, sock: socket.socket, other: socket.socket
) -> Mapping[FileId, OwnedFd]:
    end = entry.ends[0]
    _send(other, entry, end)
    if end.error:
        # What the other end leaves unread is told to this end as a reset connection.
        sock.send(b"\0")
    other.close()
    if entry.kind == socket.SOCK_DGRAM:
        # Only a connection's end is shut down by the other's going.
        _shut_down(sock, end.shutdown)
    return _finish(entry, (sock,))


def _send(sender: socket.socket, entry: UnixPairEntry, end: UnixEnd) -> None:
    """Send what waits at `end`. A sender's buffer is charged until the bytes are read."""
    sockets.set_buffer(sender, socket.SO_SNDBUF, SO_SNDBUFFORCE, _FILL_BUFFER_BYTES)
    for piece in end.unread:
        left = memoryview(piece)
        while True:
            sent = sender.send(left, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            left = left[sent:]
            if not left:
                break
            if entry.kind != socket.SOCK_STREAM:
                raise ImageError(f"a message for unix socket {end.file_id} was cut")


def _shut_down(sock: socket.socket, shutdown: int) -> None:
    how = {
        sockdiag.RCV_SHUTDOWN: socket.SHUT_RD,
        sockdiag.SEND_SHUTDOWN: socket.SHUT_WR,
        sockdiag.RCV_SHUTDOWN | sockdiag.SEND_SHUTDOWN: socket.SHUT_RDWR,
    }.get(shutdown)
    if how is not None:
        try:
            sock.shutdown(how)
        except OSError as error:
            # The other end was shut down first, and with it this one.
            if error.errno != errno.ENOTCONN:
                raise


def _finish(entry: UnixPairEntry, made: Sequence[socket.socket]) -> Mapping[FileId, OwnedFd]:
    for sock, end in zip(made, entry.ends, strict=True):
        sockets.restore(sock, end.options, _MORE)
    return {end.file_id: OwnedFd(sock.detach()) for sock, end in zip(made, entry.ends, strict=True)}


KIND = FileKind(
    name="unix socket",
    tag=15,
    entry=UnixPairEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
