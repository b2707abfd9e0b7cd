"""Links, addresses and queues of a network namespace: rtnetlink(7), veth(4), tc-tbf(8).

Only what a laboratory needs. Numbers are in the host's byte order, as the kernel wants them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from types import TracebackType
from typing import Self

from godwit.types import Fd

RTM_NEWLINK = 16
RTM_NEWADDR = 20
RTM_NEWQDISC = 36

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLMSG_ERROR = 2

IFLA_IFNAME = 3
IFLA_MASTER = 10
IFLA_LINKINFO = 18
IFLA_NET_NS_FD = 28
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
VETH_INFO_PEER = 1
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFF_UP = 0x1
SIOCGIFFLAGS = 0x8913

TCA_KIND = 1
TCA_OPTIONS = 2
TCA_TBF_PARMS = 1
TCA_TBF_RATE64 = 4
TCA_TBF_BURST = 6
TC_H_ROOT = 0xFFFFFFFF
TC_LINKLAYER_ETHERNET = 1

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change mask
_ADDRESS = struct.Struct("=BBBBi")  # ifaddrmsg: family, prefix length, flags, scope, index
_QUEUE = struct.Struct("=BxxxiIII")  # tcmsg: family, index, handle, parent, info
_RATE = struct.Struct("=BBHhHI")  # tc_ratespec: cell log, link layer, overhead, cell align, mpu, bytes/s


def _attribute(kind: int, value: bytes) -> bytes:
    padding = -len(value) % 4
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(padding)


def _word(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def link_is_up(name: str) -> bool:
    """Tell whether a link of the calling thread's namespace is switched on. netdevice(7).

    Raises:
        OSError: ENODEV, there is no such link.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        ifreq = struct.pack("=16sh22x", name.encode(), 0)
        (flags,) = struct.unpack_from("=h", fcntl.ioctl(any_socket, SIOCGIFFLAGS, ifreq), 16)
    return bool(flags & IFF_UP)


class Route:
    """A netlink socket of the network namespace the calling thread is in when it is made."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def add_bridge(self, name: str) -> int:
        """Make a bridge and return its index."""
        info = _attribute(IFLA_LINKINFO, _text(IFLA_INFO_KIND, "bridge"))
        self._create(RTM_NEWLINK, _LINK.pack(0, 0, 0, 0, 0) + _text(IFLA_IFNAME, name) + info)
        return socket.if_nametoindex(name)

    def add_veth(self, name: str, peer: str, peer_netns: Fd) -> int:
        """Make a pair of joined Ethernet links, `name` here and `peer` there, and return the index here."""
        far_end = _LINK.pack(0, 0, 0, 0, 0) + _text(IFLA_IFNAME, peer) + _word(IFLA_NET_NS_FD, peer_netns)
        data = _attribute(IFLA_INFO_DATA, _attribute(VETH_INFO_PEER, far_end))
        info = _attribute(IFLA_LINKINFO, _text(IFLA_INFO_KIND, "veth") + data)
        self._create(RTM_NEWLINK, _LINK.pack(0, 0, 0, 0, 0) + _text(IFLA_IFNAME, name) + info)
        return socket.if_nametoindex(name)

    def set_master(self, index: int, bridge: int) -> None:
        """Plug the link into a bridge."""
        self._request(RTM_NEWLINK, 0, _LINK.pack(0, 0, index, 0, 0) + _word(IFLA_MASTER, bridge))

    def set_up(self, index: int, *, up: bool) -> None:
        """Switch the link on or off."""
        self._request(RTM_NEWLINK, 0, _LINK.pack(0, 0, index, IFF_UP if up else 0, IFF_UP))

    def add_address(self, index: int, address: str, prefix_bits: int) -> None:
        """Give the link an IPv4 address."""
        packed = socket.inet_aton(address)
        body = _ADDRESS.pack(socket.AF_INET, prefix_bits, 0, 0, index)
        self._create(RTM_NEWADDR, body + _attribute(IFA_LOCAL, packed) + _attribute(IFA_ADDRESS, packed))

    def limit_rate(self, index: int, *, bytes_per_s: int, burst_bytes: int, limit_bytes: int) -> None:
        """Let no more than a rate leave by the link: a token bucket, tc-tbf(8)."""
        # A rate that does not fit 32 bits is said by TCA_TBF_RATE64, and the small field is full.
        rate = _RATE.pack(0, TC_LINKLAYER_ETHERNET, 0, 0, 0, min(bytes_per_s, 0xFFFFFFFF))
        qopt = rate + bytes(_RATE.size) + struct.pack("=III", limit_bytes, 0, 0)
        options = _attribute(TCA_TBF_PARMS, qopt) + _word(TCA_TBF_BURST, burst_bytes)
        if bytes_per_s > 0xFFFFFFFF:
            options += _attribute(TCA_TBF_RATE64, struct.pack("=Q", bytes_per_s))
        queue = _QUEUE.pack(0, index, 0, TC_H_ROOT, 0)
        self._create(RTM_NEWQDISC, queue + _text(TCA_KIND, "tbf") + _attribute(TCA_OPTIONS, options))

    def _create(self, kind: int, body: bytes) -> None:
        self._request(kind, NLM_F_CREATE | NLM_F_EXCL, body)

    def _request(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        flags |= NLM_F_REQUEST | NLM_F_ACK
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0)
        self._socket.sendall(header + body)
        while True:
            answer = self._socket.recv(65536)
            _, answer_kind, _, sequence, _ = _HEADER.unpack_from(answer)
            if sequence == self._sequence and answer_kind == NLMSG_ERROR:
                break
        (code,) = struct.unpack_from("=i", answer, _HEADER.size)
        if code:
            name = errno.errorcode.get(-code, str(-code))
            raise OSError(-code, f"rtnetlink request {kind}: {os.strerror(-code)} ({name})")
