"""Telling the host what others at home have changed, so that it may believe what it knows for long.

fanotify(7) tells of every change on a file system, with the thread that made it. What our own threads did the
host did itself. What is written through a mapping is told of only when the file is closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import Final

from godwit.linux import fanotify, fuse, handles, setfsuid, statfs
from godwit.linux.fanotify import Event
from godwit.residual.homefiles.messages import Parts
from godwit.residual.homefiles.nodes import Device, Node, Nodes
from godwit.types import OwnedFd

_CONTENT: Final = fanotify.FAN_MODIFY | fanotify.FAN_CLOSE_WRITE
_NAMES: Final = fanotify.FAN_CREATE | fanotify.FAN_DELETE | fanotify.FAN_MOVED_FROM | fanotify.FAN_MOVED_TO
_WATCHED: Final = _CONTENT | fanotify.FAN_ATTRIB | _NAMES | fanotify.FAN_ONDIR


class Watch:
    """Watches the file systems that the host knows, in a thread of its own.

    Raises:
        PermissionError: Only root may.
    """

    def __init__(self, notify: Callable[[Parts], None]) -> None:
        self._notify = notify
        self._devices: dict[bytes, Device] = {}
        self._own_threads: set[int] = set()
        with setfsuid.as_root():
            self._group = fanotify.open_watch()
        self._stop = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))
        self._thread: threading.Thread | None = None

    def add_device(self, device: Device) -> None:
        """Watch a file system from now on, if that is possible, and note so in `device`."""
        if device.mount is None or device.is_of_the_kernel:
            return
        _, fsid = statfs.file_system(device.mount.number)
        with contextlib.suppress(OSError), setfsuid.as_root():
            fanotify.mark_file_system(self._group.number, device.mount.number, _WATCHED)
            self._devices[fsid] = device
            device.is_watched = True

    def add_thread(self, tid: int) -> None:
        """Take what this thread does for the host's own doing."""
        self._own_threads.add(tid)

    def start(self, nodes: Nodes) -> None:
        """Begin to tell of changes to these nodes."""
        self._thread = threading.Thread(target=self._run, args=[nodes], name="files-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        os.eventfd_write(self._stop.number, 1)
        if self._thread is not None:
            self._thread.join()
        self._group.close()
        self._stop.close()

    def _run(self, nodes: Nodes) -> None:
        setfsuid.become(0, 0, ())
        poller = select.poll()
        poller.register(self._group.number, select.POLLIN)
        poller.register(self._stop.number, select.POLLIN)
        while not any(fd == self._stop.number for fd, _ in poller.poll()):
            events = fanotify.read_events(self._group.number)
            # Many writes to one file need one word only.
            told = [
                parts
                for event in events
                if event.tid not in self._own_threads
                for parts in self._words(nodes, event)
            ]
            for parts in dict.fromkeys(told):
                self._notify(parts)

    def _words(self, nodes: Nodes, event: Event) -> list[Parts]:
        """Return what the host has to hear of a change."""
        device = self._devices.get(event.fsid)
        if device is None:
            return []
        words: list[Parts] = []
        if event.mask & _NAMES and (parent := self._node(nodes, device, event.directory)) is not None:
            words.append(fuse.forget_entry(parent.nodeid, event.name))
        node = self._node(nodes, device, event.handle)
        if node is not None and event.mask & _CONTENT:
            words.append(fuse.forget_content(node.nodeid))
        elif node is not None:
            words.append(fuse.forget_attributes(node.nodeid))
        return words

    def _node(self, nodes: Nodes, device: Device, handle: bytes) -> Node | None:
        if not handle or device.mount is None:
            return None
        try:
            fd = handles.open_by_handle(device.mount.number, handle, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return None  # it is gone, and so are its attributes
        with fd:
            status = os.fstat(fd.number)
        return nodes.known(status.st_dev, status.st_ino)
