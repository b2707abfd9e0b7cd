"""A line that a test can cut, or have fall silent."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Final

_STEP_BYTES: Final = 1 << 16
_RESET: Final = struct.pack("ii", 1, 0)


@dataclass
class _Connection:
    near: socket.socket
    far: socket.socket
    room_bytes: float = float("inf")  # what passes in each direction before it falls silent
    stalled: threading.Event = field(default_factory=threading.Event)

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        room = self.room_bytes
        try:
            while data := source.recv(_STEP_BYTES):
                room -= len(data)
                if room < 0:
                    self.stalled.set()
                if self.stalled.is_set():
                    return
                sink.sendall(data)
            if not self.stalled.is_set():
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            if not self.stalled.is_set():
                self.cut()

    def cut(self) -> None:
        """Reset both halves, as a line does that is gone."""
        for each in (self.near, self.far):
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                # Wakes the thread that reads, which then drops the last reference.
                each.shutdown(socket.SHUT_RD)
            each.close()


class Proxy:
    """Passes connections on to one address."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._connections: list[_Connection] = []
        self.next_room_bytes = float("inf")
        """How much passes over the next connection that is made."""
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def host(self) -> str:
        return f"tls://127.0.0.1:{self._server.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made = _Connection(near, far, self.next_room_bytes)
            self.next_room_bytes = float("inf")
            self._connections.append(made)
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=made.pump, args=(source, sink), daemon=True)
                thread.start()
                self._threads.append(thread)

    def cut(self) -> None:
        """End the connections that there are. Later ones are not touched."""
        for each in self._connections:
            each.cut()

    def stall(self) -> None:
        """Let nothing pass any more over the connections that there are, and say nothing either."""
        for each in self._connections:
            each.stalled.set()

    def end_stalled(self) -> None:
        """End them, as the kernel's timers do in the end."""
        for each in self._connections:
            if each.stalled.is_set():
                each.cut()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join(timeout=5)
