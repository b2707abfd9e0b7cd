"""Internet sockets that talk to nobody in particular: tcp(7), udp(7), ip(7), ipv6(7).

Carried: a listening TCP socket whose accept queue is empty, a TCP socket that never was connected,
a UDP socket without a peer and without datagrams waiting. Connections are refused for now, unless the
user allows them to break: then the program finds them reset by the peer, and its clients come again.
Multicast memberships are shown nowhere, so a UDP socket that joined a group has to join again.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import DestinationError, ImageError
from godwit.linux import sockdiag
from godwit.resources import sockets
from godwit.resources.base import (
    FileKind,
    Finding,
    OpenFile,
    RestoreContext,
    Tree,
    moves,
    refuse_outside_holders,
)
from godwit.resources.sockets import SO_PEEK_OFF, SocketOptions
from godwit.types import FileId, OwnedFd

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_CLOSE_FIRST = "let the program close it, then try again"
_CLOSE_OR_BREAK = "let the program close it, or allow it to break with --tcp-close"
_TCP_INFO_BYTES = 256

_SOL, _IP, _IPV6 = socket.SOL_SOCKET, socket.IPPROTO_IP, socket.IPPROTO_IPV6
_TCP, _UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
_UDP_CORK, _UDP_ENCAP = 1, 100

# Numbers the standard library does not name are those of linux/in.h, in6.h, tcp.h and udp.h.
_COMMON: tuple[tuple[int, int], ...] = (
    (_SOL, socket.SO_BINDTODEVICE),
    *((_IP, name) for name in (1, 2, 6, 8, 10, 11, 12, 13, 15, 18, 19, 20, 21, 24, 32, 33, 34, 49)),
)
_V6: tuple[tuple[int, int], ...] = tuple(
    (_IPV6, name) for name in (16, 17, 18, 19, 23, 25, 26, 29, 49, 51, 53, 56, 58, 60, 62, 66, 67, 74, 75, 78)
)
# Congestion control first: it may set others.
_TCP_OPTIONS: tuple[tuple[int, int], ...] = tuple(
    (_TCP, name) for name in (13, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 23, 25, 34)
)
_UDP_OPTIONS: tuple[tuple[int, int], ...] = (
    (_SOL, SO_PEEK_OFF),
    *((_UDP, name) for name in (101, 102, 103, 104)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InetEntry:
    """An internet socket in an image."""

    file_id: FileId
    family: int  # AF_INET, AF_INET6
    kind: int  # SOCK_STREAM (TCP), SOCK_DGRAM (UDP)
    host: str
    port: int  # 0: not bound to any
    backlog: int  # -1: does not listen
    options: SocketOptions
    reset: bool = False  # it was connected; it comes back reset by its peer

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open file this restores."""
        return (self.file_id,)


def _options(family: int, kind: int) -> tuple[tuple[int, int], ...]:
    of_kind = _TCP_OPTIONS if kind == socket.SOCK_STREAM else _UDP_OPTIONS
    return (*_COMMON, *(_V6 if family == socket.AF_INET6 else ()), *of_kind)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    identity = sockets.identify(file)
    return identity is not None and identity.family in _FAMILIES


def _what(sock: socket.socket) -> str:
    names = {(socket.SOCK_STREAM, _TCP): "TCP", (socket.SOCK_DGRAM, _UDP): "UDP"}
    name = names.get((sock.type, sock.proto), f"internet (type {sock.type}, protocol {sock.proto})")
    return f"{name} socket {_address_text(sock)}"


def _name(file: OpenFile) -> str:
    with sockets.borrow(file) as sock:
        return _what(sock)


def _address_text(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    peer = _peer(sock)
    return f"{text} to {peer[0]}:{peer[1]}" if peer else text


def _peer(sock: socket.socket) -> tuple[str, int] | None:
    try:
        host, port = sock.getpeername()[:2]
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return None
    return host, port


def _check(file: OpenFile, what: str, tree: Tree) -> None:
    refuse_outside_holders(file, tree, what)
    with sockets.borrow(file) as sock:
        if not _breaks(sock, tree):
            _check_state(file, sock, what)
            _check_queue(file, sock, what, tree)


def _breaks(sock: socket.socket, tree: Tree) -> bool:
    """Tell whether it is a connection that may break."""
    if not tree.closes_connections or (sock.type, sock.proto) != (socket.SOCK_STREAM, _TCP):
        return False
    return _TcpInfo.of(sock).state not in (sockdiag.TCP_CLOSE, sockdiag.TCP_LISTEN)


def _check_state(file: OpenFile, sock: socket.socket, what: str) -> None:
    if (sock.type, sock.proto) not in ((socket.SOCK_STREAM, _TCP), (socket.SOCK_DGRAM, _UDP)):
        raise file.refuse(what, "its protocol is not carried", _CLOSE_FIRST)
    if _peer(sock):
        remedy = _CLOSE_OR_BREAK if sock.type == socket.SOCK_STREAM else _CLOSE_FIRST
        raise file.refuse(what, "connections are not carried yet", remedy)
    if sock.type == socket.SOCK_STREAM:
        _check_tcp(file, sock, what)
    elif any(sock.getsockopt(_UDP, name) for name in (_UDP_CORK, _UDP_ENCAP)):
        raise file.refuse(what, "it holds a datagram back, or takes apart a tunnel", _CLOSE_FIRST)
    if sock.family == socket.AF_INET6 and sock.getsockname()[3]:
        raise file.refuse(what, "its address belongs to one network card", "bind it to another address")
    if sockets.has_filter(sock):
        raise file.refuse(what, "a packet filter is attached to it", "detach the filter")


def _check_queue(file: OpenFile, sock: socket.socket, what: str, tree: Tree) -> None:
    """Refuse what waits to be taken by the program: for a moment, if it is up to it."""
    if sock.type == socket.SOCK_DGRAM:
        if _has_datagrams(sock):
            raise file.refuse(what, "datagrams wait to be received", "try again in a moment")
        return
    info = _TcpInfo.of(sock)
    if info.state == sockdiag.TCP_LISTEN and info.waiting and not tree.closes_connections:
        raise file.refuse(what, f"{info.waiting} connections wait to be accepted", "try again in a moment")


def _check_tcp(file: OpenFile, sock: socket.socket, what: str) -> None:
    info = _TcpInfo.of(sock)
    if info.state == sockdiag.TCP_CLOSE:
        if info.segments or sockets.has_error(sock):
            raise file.refuse(what, "its connection has ended and the program was not told", _CLOSE_FIRST)
    elif info.state != sockdiag.TCP_LISTEN:
        raise file.refuse(what, "connections are not carried yet", _CLOSE_OR_BREAK)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TcpInfo:
    """What of struct tcp_info we use."""

    state: int
    waiting: int  # in the accept queue, for a listening socket
    backlog: int
    segments: int  # ever sent or received

    @classmethod
    def of(cls, sock: socket.socket) -> _TcpInfo:
        raw = sock.getsockopt(_TCP, socket.TCP_INFO, _TCP_INFO_BYTES).ljust(_TCP_INFO_BYTES, b"\0")
        waiting, backlog = struct.unpack_from("=II", raw, 24)  # tcpi_unacked, tcpi_sacked
        sent, received = struct.unpack_from("=II", raw, 136)  # tcpi_segs_out, tcpi_segs_in
        return cls(state=raw[0], waiting=waiting, backlog=backlog, segments=sent + received)


def inspect(file: OpenFile, tree: Tree) -> Finding:
    """Find that it moves, if it is not connected."""
    try:
        what = _name(file)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ESRCH):
            raise
        return moves(file, "internet socket", why="closed meanwhile")
    why = ""
    with contextlib.suppress(OSError), sockets.borrow(file) as sock:
        if _breaks(sock, tree):
            why = "it is closed: the program finds it reset by its peer"
    return moves(file, what, lambda: _check(file, what, tree), why=why)


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[InetEntry]:
    """Note addresses and options; nothing is received or accepted."""
    return [_entry(file, tree) for file in files]


def _entry(file: OpenFile, tree: Tree) -> InetEntry:
    _check(file, _name(file), tree)
    with sockets.borrow(file) as sock:
        backlog = -1
        if sock.type == socket.SOCK_STREAM:
            info = _TcpInfo.of(sock)
            backlog = info.backlog if info.state == sockdiag.TCP_LISTEN else -1
        host, port = sock.getsockname()[:2]
        return InetEntry(
            file_id=file.file_id,
            family=sock.family,
            kind=sock.type,
            host=host,
            port=port,
            backlog=backlog,
            options=sockets.collect(sock, _options(sock.family, sock.type)),
            reset=_breaks(sock, tree),
        )


def _has_datagrams(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def restore(entry: InetEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:  # noqa: ARG001
    """Make the socket with its options, bind it, and listen.

    Raises:
        DestinationError: This machine has not the address, or the port is taken.
    """
    if entry.family not in _FAMILIES or entry.kind not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        raise ImageError(f"socket {entry.file_id} has family {entry.family} and type {entry.kind}")
    if not 0 <= entry.port < 2**16 or not -1 <= entry.backlog < 2**31:
        raise ImageError(f"socket {entry.file_id} has port {entry.port} and backlog {entry.backlog}")
    options = _options(entry.family, entry.kind)
    if entry.reset:
        with _reset_connection(entry.family) as sock:
            return {entry.file_id: OwnedFd(sock.detach())}
    with socket.socket(entry.family, entry.kind) as sock:
        sockets.restore(sock, entry.options, options)
        try:
            _bind(sock, entry)
        except OSError as error:
            raise DestinationError(
                f"cannot bind {entry.host} port {entry.port}: {error.strerror}",
                remedy="give the destination that address, or end what uses the port there; without"
                " SO_REUSEADDR connections that have ended hold the port for a minute",
            ) from error
        return {entry.file_id: OwnedFd(sock.detach())}


def _reset_connection(family: int) -> socket.socket:
    """Make a socket whose peer has reset the connection: the next read says so, the one after, the end."""
    loopback = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        with socket.create_server((loopback, 0), family=socket.AddressFamily(family)) as server:
            sock.connect(server.getsockname())
            peer, _ = server.accept()
            peer.setsockopt(_SOL, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            peer.close()
    except OSError as error:
        sock.close()
        raise DestinationError(
            f"cannot make a broken connection: {error.strerror}",
            remedy="bring up the loopback interface there",
        ) from error
    return sock


def _bind(sock: socket.socket, entry: InetEntry) -> None:
    any_address = "::" if entry.family == socket.AF_INET6 else "0.0.0.0"  # noqa: S104  # compared with
    if not entry.port and entry.host == any_address and entry.backlog < 0:
        return
    reuse = sock.getsockopt(_SOL, socket.SO_REUSEADDR)
    if entry.kind == socket.SOCK_STREAM:
        # Connections of an earlier stay that have ended must not keep the port from us.
        sock.setsockopt(_SOL, socket.SO_REUSEADDR, 1)
    sock.bind((entry.host, entry.port))
    sock.setsockopt(_SOL, socket.SO_REUSEADDR, reuse)
    if entry.backlog >= 0:
        sock.listen(entry.backlog)


KIND = FileKind(
    name="internet socket",
    tag=18,
    entry=InetEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
