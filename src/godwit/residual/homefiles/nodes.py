"""Which file of home a node id of the host is.

A node is one inode, whatever its names. It is held by an O_PATH descriptor; of those there are at most so
many, and the file of a node without one is found again by its handle. A node lives until the host's kernel
has forgotten it as often as it was told of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from godwit.linux import fuse, handles, setfsuid, statfs
from godwit.residual.homefiles.messages import fail
from godwit.types import Fd, OwnedFd

# Of the kernel at home: the host has its own. <linux/magic.h>
_OF_THE_KERNEL: Final = frozenset({0x9FA0, 0x62656572})  # proc, sysfs
_INO_BITS_OF_A_MOUNT: Final = 48
_NEVER_FORGOTTEN: Final = 1 << 62


class Device:
    """One of home's file systems below the exported directory."""

    __slots__ = ("is_of_the_kernel", "is_watched", "mask", "mount", "number")

    def __init__(self, number: int, index: int, mount: OwnedFd | None, *, is_of_the_kernel: bool) -> None:
        self.number = number
        self.mount = mount  # for handles; None: it has none, or we may not use them
        self.mask = (index << _INO_BITS_OF_A_MOUNT) & 0xFFFFFFFFFFFFFFFF
        self.is_of_the_kernel = is_of_the_kernel
        self.is_watched = False  # the host hears of changes


class Node:
    """One file, as the host knows it."""

    __slots__ = ("device", "fd", "handle", "key", "kind", "lookups", "nodeid", "seen", "special")

    def __init__(self, nodeid: int, fd: int, device: Device, status: os.stat_result) -> None:
        self.nodeid = nodeid
        self.fd = fd  # -1: by the handle
        self.device = device
        self.kind = stat.S_IFMT(status.st_mode)
        self.key: tuple[int, int] | None = (status.st_dev, status.st_ino)  # None: cannot be found by it
        self.handle = b""
        self.lookups = 0
        self.seen: tuple[int, ...] = ()  # its `signature` when the host last knew nothing older
        self.special = False  # the descriptor is an open file of ours, and stands for itself


def signature(status: os.stat_result) -> tuple[int, int, int]:
    """Return what is another after a file has been written or changed."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Nodes:
    """All nodes of one mount at the host."""

    def __init__(self, root: OwnedFd, max_descriptors: int, add_device: Callable[[Device], None]) -> None:
        self._add_device = add_device  # called before anything on it is told
        self._max_descriptors = max_descriptors
        self._last_nodeid = fuse.FUSE_ROOT_ID - 1
        self._by_id: dict[int, Node] = {}
        self._by_key: dict[tuple[int, int], Node] = {}
        self._devices: dict[int, Device] = {}
        self._closable: OrderedDict[int, Node] = OrderedDict()  # least recently used first
        # Through a descriptor of that directory no mount over /proc can mislead us later.
        self._own = OwnedFd(os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self.root = self.found(root)
        self.root.lookups = _NEVER_FORGOTTEN
        self._closable.pop(self.root.nodeid, None)

    @property
    def own(self) -> Fd:
        """The directory in which each of our descriptors has its number as a name."""
        return self._own.number

    def get(self, nodeid: int) -> Node:
        """Return a node. Raises OSError: ESTALE, the host was never told of it, or has forgotten it."""
        node = self._by_id.get(nodeid)
        if node is None:
            raise fail(errno.ESTALE)
        return node

    def known(self, device: int, inode: int) -> Node | None:
        """Return the node of a file, if the host knows it."""
        return self._by_key.get((device, inode))

    def fd(self, node: Node) -> Fd:
        """Return a descriptor of the node's file, at least O_PATH, good until the next request.

        Raises:
            OSError: ESTALE, the file is gone.
        """
        if node.fd < 0:
            self._open_again(node)
        elif node.nodeid in self._closable:
            self._closable.move_to_end(node.nodeid)
        return Fd(node.fd)

    def path(self, node: Node) -> bytes:
        """Return the name of the node's file in the directory `own`. Raises as `fd` does."""
        return b"%d" % self.fd(node)

    def found(self, fd: OwnedFd, status: os.stat_result | None = None) -> Node:
        """Take over an O_PATH descriptor, and return the node of its file, which the host will be told of."""
        with fd:
            status = status or os.fstat(fd.number)
            node = self._by_key.get((status.st_dev, status.st_ino))
            if node is not None and not self._is_still(node, fd):
                # The number went to another file; the old one lives on by its id, or not at all.
                del self._by_key[status.st_dev, status.st_ino]
                node.key = None
                node = None
            if node is None:
                node = self._add(fd, self._device(fd, status), status)
            node.lookups += 1
            return node

    def found_special(self, fd: OwnedFd) -> Node:
        """Take over an open file that is to be a node of its own, whatever other node its file has."""
        with fd:
            status = os.fstat(fd.number)
            node = self._new(fd, self._device(fd, status), status)
            node.special = True
            node.key = None
            node.lookups += 1
            return node

    def forget(self, nodeid: int, lookups: int) -> None:
        """Note that the host has forgotten a node so many times; the last time ends it."""
        node = self._by_id.get(nodeid)
        if node is None:
            return
        node.lookups -= lookups
        if node.lookups > 0 or node is self.root:
            return
        del self._by_id[nodeid]
        if node.key is not None:
            del self._by_key[node.key]
        self._closable.pop(nodeid, None)
        if node.fd >= 0:
            os.close(node.fd)

    def is_left_to_the_host(self, node: Node) -> bool:
        """Tell whether the node is on a file system of home's kernel, which must look empty."""
        return node.device.is_of_the_kernel

    def devices(self) -> list[Device]:
        """List the file systems met so far."""
        return list(self._devices.values())

    def close(self) -> None:
        """Let every file go."""
        for node in self._by_id.values():
            if node.fd >= 0:
                os.close(node.fd)
        self._by_id.clear()
        self._by_key.clear()
        self._closable.clear()
        for device in self._devices.values():
            if device.mount is not None:
                device.mount.close()
        self._devices.clear()
        self._own.close()

    def _add(self, fd: OwnedFd, device: Device, status: os.stat_result) -> Node:
        node = self._new(fd, device, status)
        self._by_key[status.st_dev, status.st_ino] = node
        if device.mount is not None:
            self._closable[node.nodeid] = node
            self._close_oldest()
        return node

    def _new(self, fd: OwnedFd, device: Device, status: os.stat_result) -> Node:
        self._last_nodeid += 1
        node = Node(self._last_nodeid, fd.detach(), device, status)
        self._by_id[node.nodeid] = node
        return node

    def _is_still(self, node: Node, fd: OwnedFd) -> bool:
        """Tell whether a node with the inode number of `fd` has its file, and give it that if it has none."""
        if node.fd >= 0:
            return True  # as long as a file is open its number is its own
        if handles.name_to_handle(fd.number) != node.handle:
            return False
        node.fd = fd.detach()
        self._closable[node.nodeid] = node
        self._close_oldest()
        return True

    def _open_again(self, node: Node) -> None:
        assert node.device.mount is not None
        with setfsuid.as_root():
            fd = handles.open_by_handle(node.device.mount.number, node.handle, os.O_PATH | os.O_CLOEXEC)
        node.fd = fd.detach()
        self._closable[node.nodeid] = node
        self._close_oldest()

    def _close_oldest(self) -> None:
        while len(self._closable) > self._max_descriptors:
            _, node = self._closable.popitem(last=False)
            # Of a file without a name nothing may be left once it is closed.
            if os.fstat(node.fd).st_nlink == 0:
                continue
            node.handle = node.handle or handles.name_to_handle(Fd(node.fd))
            os.close(node.fd)
            node.fd = -1

    def _device(self, fd: OwnedFd, status: os.stat_result) -> Device:
        device = self._devices.get(status.st_dev)
        if device is None:
            kind, _ = statfs.file_system(fd.number)
            mount = self._mount(fd, status)
            index = len(self._devices)
            device = Device(status.st_dev, index, mount, is_of_the_kernel=kind in _OF_THE_KERNEL)
            self._devices[status.st_dev] = device
            self._add_device(device)
        return device

    def _mount(self, fd: OwnedFd, status: os.stat_result) -> OwnedFd | None:
        """Return a descriptor by which files of this file system open by handle, or None."""
        if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
            return None
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        with (
            contextlib.suppress(OSError),
            setfsuid.as_root(),
            OwnedFd(os.open(b"%d" % fd.number, flags, dir_fd=self.own)) as mount,
        ):
            handles.open_by_handle(mount.number, handles.name_to_handle(mount.number), os.O_PATH).close()
            return mount.release()
        return None
