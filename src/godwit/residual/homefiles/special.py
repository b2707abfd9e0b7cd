"""Open files of home that no path leads to: deleted ones, or ones that somebody else shares.

They are entries of a directory below the exported root that is never listed. To open one at the host is to
get the very open file description, with its locks; only the offset is the host's own.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from godwit.linux import fuse
from godwit.residual.homefiles.messages import fail
from godwit.residual.homefiles.nodes import Node, Nodes
from godwit.types import OwnedFd

DIRECTORY: Final = b".godwit-open-files"


class Special:
    """The directory of registered descriptors."""

    def __init__(self) -> None:
        self._directory: Node | None = None
        self._open: dict[bytes, OwnedFd] = {}
        self._nodes: dict[bytes, Node] = {}
        self._last = 0

    def register(self, fd: OwnedFd) -> bytes:
        """Take over a descriptor and return the path, below the exported root, that opens it."""
        self._last += 1
        name = b"%d" % self._last
        self._open[name] = fd.release()
        return DIRECTORY + b"/" + name

    def find(self, nodes: Nodes, parent: int, name: bytes) -> Node | None:
        """Return the node of a name here, told of once more; None for a name that is not ours.

        Raises:
            OSError: ENOENT, there is no such file registered.
        """
        if parent == fuse.FUSE_ROOT_ID and name == DIRECTORY and self._open:
            self._directory = self._told(nodes, self._directory, nodes.fd(nodes.root))
            return self._directory
        if self._directory is None or parent != self._directory.nodeid:
            return None
        if name not in self._open:
            raise fail(errno.ENOENT)
        node = self._told(nodes, self._nodes.get(name), self._open[name].number)
        self._nodes[name] = node
        return node

    def close(self) -> None:
        """Let every registered descriptor go."""
        for fd in self._open.values():
            fd.close()
        self._open.clear()

    def _told(self, nodes: Nodes, node: Node | None, fd: int) -> Node:
        if node is None or node.lookups <= 0:
            return nodes.found_special(OwnedFd(os.dup(fd)))
        node.lookups += 1
        return node
