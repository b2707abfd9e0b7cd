"""Ethernet links whose wire is a descriptor: the tun driver, Documentation/networking/tuntap.rst."""

from __future__ import annotations

import fcntl
import os
import struct

from godwit.types import OwnedFd

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 0x1
TUN_F_TSO4 = 0x2
TUN_F_TSO6 = 0x4

VNET_HEADER_BYTES = 10  # virtio_net_hdr, before each frame
MAX_FRAME_BYTES = VNET_HEADER_BYTES + 14 + 65535


def make_tap(name: str) -> OwnedFd:
    """Make an Ethernet link in the network namespace of the calling thread.

    Each read and write of the descriptor is one frame after a virtio_net_hdr. Frames may be large
    TCP segments that are not cut yet, with checksums still to be filled in: what one such
    descriptor gives, another takes. The descriptor does not block. The link ends when it is closed.
    """
    with OwnedFd(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)) as fd:
        ifreq = struct.pack("=16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        fcntl.ioctl(fd, TUNSETIFF, ifreq)
        fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
        return fd.release()
