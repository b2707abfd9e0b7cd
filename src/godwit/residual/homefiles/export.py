"""What an exported directory is made of, and the answers that many operations share."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from godwit.linux import fuse
from godwit.residual.homefiles.credentials import Credentials
from godwit.residual.homefiles.files import Files
from godwit.residual.homefiles.locks import Locks
from godwit.residual.homefiles.messages import Identity, Parts, Request, fail
from godwit.residual.homefiles.nodes import Node, Nodes
from godwit.residual.homefiles.special import Special
from godwit.types import OwnedFd

_NS: Final = 1_000_000_000
# What open(2) at home may be told of what was asked for at the host. O_DIRECT is between a program and its
# page cache; O_NONBLOCK, for regular files, is nothing.
_OPEN_FLAGS: Final = (
    os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_EXCL | os.O_DSYNC | os.O_SYNC | os.O_NOATIME
)


@dataclass(slots=True)
class Export:
    """One directory as one host sees it."""

    nodes: Nodes
    files: Files
    locks: Locks
    special: Special
    credentials: Credentials
    ttl_ns: int  # how long the host may believe what it was told
    watched_ttl_ns: int  # the same, of what it hears of when it changes
    notify: Callable[[Parts], None]

    def status_of(self, node: Node, status: os.stat_result) -> bytes:
        """Return `struct fuse_attr` of a file."""
        access_s, access_ns = divmod(status.st_atime_ns, _NS)
        modification_s, modification_ns = divmod(status.st_mtime_ns, _NS)
        change_s, change_ns = divmod(status.st_ctime_ns, _NS)
        return fuse.fuse_attr.pack(
            # Numbers of two file systems of home must not meet in the one the host sees.
            *(status.st_ino ^ node.device.mask, status.st_size, status.st_blocks),
            *(access_s, modification_s, change_s, access_ns, modification_ns, change_ns),
            *(status.st_mode, status.st_nlink, status.st_uid, status.st_gid),
            *(status.st_rdev & 0xFFFFFFFF, status.st_blksize, 0),
        )

    def attr_out(self, node: Node, status: os.stat_result) -> Parts:
        """Return the answer that holds a file's attributes."""
        seconds, ns = self.ttl(node)
        return (fuse.fuse_attr_out.pack(seconds, ns, 0), self.status_of(node, status))

    def entry_out(self, node: Node, status: os.stat_result) -> Parts:
        """Return the answer that tells of a node."""
        seconds, ns = self.ttl(node)
        entry = fuse.fuse_entry_out.pack(node.nodeid, 0, seconds, seconds, ns, ns)
        return (entry, self.status_of(node, status))

    def no_entry(self, directory: Node) -> Parts:
        """Return the answer that there is no such name. Raises it, where the host may not remember it."""
        if not directory.device.is_watched:
            raise fail(errno.ENOENT)
        seconds, ns = self.ttl(directory)
        return (fuse.fuse_entry_out.pack(0, 0, seconds, 0, ns, 0), bytes(fuse.fuse_attr.size))

    def ttl(self, node: Node) -> tuple[int, int]:
        """Return how long the host may believe what it is told of a node, in seconds and nanoseconds."""
        return divmod(self.watched_ttl_ns if node.device.is_watched else self.ttl_ns, _NS)

    def directory(self, nodeid: int) -> Node:
        """Return a node whose entries may be used.

        Raises:
            OSError: ESTALE; ENOTDIR; ENOENT, it is to look empty.
        """
        node = self.nodes.get(nodeid)
        if node.kind != stat.S_IFDIR:
            raise fail(errno.ENOTDIR)
        if node.device.is_of_the_kernel or node.special:
            raise fail(errno.ENOENT)
        return node

    def identity(self, request: Request) -> Identity:
        """Return as whom the request is served. Raises OSError: EACCES."""
        return self.credentials.identity(request.uid, request.gid)

    def open_node(self, node: Node, flags: int) -> OwnedFd:
        """Open a file anew as the acting user.

        Raises:
            OSError: ELOOP or EACCES for what the host's kernel opens without asking: links, devices, pipes,
                sockets.
        """
        if node.kind not in {stat.S_IFREG, stat.S_IFDIR} or node.device.is_of_the_kernel:
            raise fail(errno.ELOOP if node.kind == stat.S_IFLNK else errno.EACCES)
        kept = flags & (_OPEN_FLAGS & ~os.O_EXCL) | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        if node.kind == stat.S_IFDIR:
            kept |= os.O_DIRECTORY
        return OwnedFd(os.open(self.nodes.path(node), kept, dir_fd=self.nodes.own))

    def adopt(self, fd: OwnedFd) -> tuple[Node, os.stat_result]:
        """Return the node of an open file, which stays its owner's."""
        path = OwnedFd(os.open(b"%d" % fd.number, os.O_PATH | os.O_CLOEXEC, dir_fd=self.nodes.own))
        status = os.fstat(path.number)
        return self.nodes.found(path, status), status


def creation_flags(flags: int) -> int:
    """Return the flags with which home makes and opens a file."""
    return flags & _OPEN_FLAGS | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
