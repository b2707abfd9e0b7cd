"""What the kernel tells of unix sockets: sock_diag(7), and which namespace a socket is in."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from godwit.linux import ns
from godwit.types import Fd, OwnedFd

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
NLMSG_ERROR = 2
SIOCGSKNS = 0x894C

UDIAG_SHOW_NAME = 0x01
UDIAG_SHOW_PEER = 0x04
UNIX_DIAG_NAME = 0
UNIX_DIAG_PEER = 2
UNIX_DIAG_SHUTDOWN = 6

TCP_ESTABLISHED = 1  # the states of TCP serve unix sockets too
TCP_CLOSE = 7
TCP_LISTEN = 10

RCV_SHUTDOWN = 1
SEND_SHUTDOWN = 2

_NLMSGHDR = struct.Struct("=IHHII")
_UNIX_DIAG_REQ = struct.Struct("=BBHIII2I")
_UNIX_DIAG_MSG = struct.Struct("=BBBBI2I")
_ATTRIBUTE = struct.Struct("=HH")
_NO_COOKIE = (0xFFFFFFFF, 0xFFFFFFFF)
_REPLY_BYTES = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocket:
    """One unix socket as unix_diag shows it."""

    inode: int
    kind: int  # SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
    state: int  # TCP_ESTABLISHED, TCP_CLOSE, TCP_LISTEN
    name: bytes | None  # None: not bound; starts with a zero byte: abstract
    peer: int | None  # its inode; 0: the peer was closed; None: never connected
    shutdown: int  # RCV_SHUTDOWN, SEND_SHUTDOWN


def unix_socket(inode: int, own: Fd) -> UnixSocket:
    """Look up a unix socket of which we have a descriptor, in whatever network namespace it is.

    Raises:
        FileNotFoundError: It is gone.
        OSError: The kernel has no unix_diag.
    """
    with _netlink_socket(own) as netlink:
        body = _UNIX_DIAG_REQ.pack(
            socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, UDIAG_SHOW_NAME | UDIAG_SHOW_PEER, *_NO_COOKIE
        )
        header = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0)
        netlink.send(header + body)
        return parse_unix(netlink.recv(_REPLY_BYTES))


def _netlink_socket(own: Fd) -> socket.socket:
    """Make a netlink socket in the network namespace of the socket `own`."""
    try:
        theirs = OwnedFd(fcntl.ioctl(own, SIOCGSKNS))
    except PermissionError:
        # Without CAP_NET_ADMIN there is no way to ask, nor to go elsewhere.
        return _open_netlink()
    with theirs:
        here = os.stat("/proc/thread-self/ns/net")
        if os.path.samestat(here, os.fstat(theirs.number)):
            return _open_netlink()
        return _open_netlink_in(theirs.number)


def _open_netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)


def _open_netlink_in(netns: Fd) -> socket.socket:
    made: list[socket.socket] = []
    errors: list[OSError] = []

    def body() -> None:
        try:
            ns.setns(netns, ns.CLONE_NEWNET)
            made.append(_open_netlink())
        except OSError as error:
            errors.append(error)

    # A thread has a network namespace of its own, and takes it along when it ends.
    thread = threading.Thread(target=body, name="sock-diag")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return made[0]


def parse_unix(reply: bytes) -> UnixSocket:
    """Read the kernel's answer about one unix socket.

    Raises:
        OSError: The answer is an error.
        ValueError: It is no such answer.
    """
    if len(reply) < _NLMSGHDR.size:
        raise ValueError(f"unix_diag: {len(reply)} bytes are no answer")
    length, kind, _, _, _ = _NLMSGHDR.unpack_from(reply)
    body = reply[_NLMSGHDR.size : length]
    if kind == NLMSG_ERROR and len(body) >= 4:
        number = -struct.unpack_from("=i", body)[0]
        raise OSError(number, f"unix_diag: {os.strerror(number)}")
    if kind != SOCK_DIAG_BY_FAMILY or len(body) < _UNIX_DIAG_MSG.size:
        raise ValueError(f"unix_diag: message of type {kind} with {len(body)} bytes")
    _, socket_kind, state, _, inode, _, _ = _UNIX_DIAG_MSG.unpack_from(body)
    attributes = dict(_attributes(body[_UNIX_DIAG_MSG.size :]))
    peer = attributes.get(UNIX_DIAG_PEER)
    return UnixSocket(
        inode=inode,
        kind=socket_kind,
        state=state,
        name=attributes.get(UNIX_DIAG_NAME),
        peer=None if peer is None else struct.unpack("=I", peer)[0],
        shutdown=attributes.get(UNIX_DIAG_SHUTDOWN, b"\0")[0],
    )


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            raise ValueError(f"unix_diag: attribute {kind} of {length} bytes")
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
