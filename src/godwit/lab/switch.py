"""A switch in user space that holds every frame back for a while: the delay of a laboratory's links.

Many kernels come without netem; this needs only the tun driver. TCP's large segments pass through
whole, so that a frame costs the same whether it holds one kilobyte or sixty-four.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from godwit.linux.tun import MAX_FRAME_BYTES, VNET_HEADER_BYTES
from godwit.types import OwnedFd

_QUEUE_BYTES = 64 << 20
_BATCH = 64
_MAC_BYTES = 6
_GROUP_BIT = 0x01  # in the first byte of a MAC: for many
# The link is off, or full: a wire loses what it cannot carry.
_LOST = frozenset({errno.EAGAIN, errno.EIO, errno.ENOBUFS, errno.EINVAL, errno.EBADFD})


@dataclass(slots=True)
class Delayer:
    """Which frames go where and when. Holds no descriptors and knows no clock.

    Ports are small integers.
    """

    ports: int
    delay_ns: int
    held_bytes: int = 0
    _port_of: dict[bytes, int] = field(default_factory=dict[bytes, int])
    _queue: deque[tuple[int, Sequence[int], bytes]] = field(
        default_factory=deque[tuple[int, Sequence[int], bytes]]
    )

    def take(self, now_ns: int, port: int, frame: bytes) -> None:
        """Take a frame, after its virtio_net_hdr, that came in at `port`. Full: it is lost."""
        target = frame[VNET_HEADER_BYTES : VNET_HEADER_BYTES + _MAC_BYTES]
        source = frame[VNET_HEADER_BYTES + _MAC_BYTES : VNET_HEADER_BYTES + 2 * _MAC_BYTES]
        if len(source) < _MAC_BYTES or self.held_bytes + len(frame) > _QUEUE_BYTES:
            return
        if not source[0] & _GROUP_BIT:
            self._port_of[source] = port
        known = None if target[0] & _GROUP_BIT else self._port_of.get(target)
        if known == port:
            return
        to = [other for other in range(self.ports) if other != port] if known is None else (known,)
        self._queue.append((now_ns + self.delay_ns, to, frame))
        self.held_bytes += len(frame)

    def due(self, now_ns: int) -> list[tuple[Sequence[int], bytes]]:
        """Return the frames whose time has come, in the order they came, each with its ports."""
        out: list[tuple[Sequence[int], bytes]] = []
        while self._queue and self._queue[0][0] <= now_ns:
            _, to, frame = self._queue.popleft()
            self.held_bytes -= len(frame)
            out.append((to, frame))
        return out

    def wait_s(self, now_ns: int) -> float | None:
        """Return the seconds until a frame is due, or None when none is held."""
        return max(0, self._queue[0][0] - now_ns) / 1e9 if self._queue else None


def run(taps: Sequence[OwnedFd], delay_ns: int) -> NoReturn:
    """Switch frames between links of `make_tap` until the process is killed."""
    fds = [tap.number for tap in taps]
    port_of = {fd: port for port, fd in enumerate(fds)}
    delayer = Delayer(ports=len(fds), delay_ns=delay_ns)
    while True:
        # select(2) counts microseconds; poll and epoll would round a short delay up to a millisecond.
        ready, _, _ = select.select(fds, (), (), delayer.wait_s(time.monotonic_ns()))
        for fd in ready:
            _drain(fd, port_of[fd], delayer)
        for to, frame in delayer.due(time.monotonic_ns()):
            for port in to:
                _send(fds[port], frame)


def _drain(fd: int, port: int, delayer: Delayer) -> None:
    for _ in range(_BATCH):
        try:
            frame = os.read(fd, MAX_FRAME_BYTES)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            return
        delayer.take(time.monotonic_ns(), port, frame)


def _send(fd: int, frame: bytes) -> None:
    try:
        os.write(fd, frame)
    except OSError as error:
        if error.errno not in _LOST:
            raise
