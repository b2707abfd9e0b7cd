"""Opening and closing: open(2), close(2)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from godwit.linux import fuse, setfsuid
from godwit.residual.homefiles.export import Export, creation_flags
from godwit.residual.homefiles.files import OpenFile
from godwit.residual.homefiles.messages import Parts, Request, fail, fields, names
from godwit.residual.homefiles.nodes import Node, signature
from godwit.types import OwnedFd


def open_(export: Export, request: Request) -> Parts:
    """Answer FUSE_OPEN."""
    flags, _ = fields(request, fuse.fuse_open_in)
    node = export.nodes.get(request.nodeid)
    if node.special:
        return _open_special(export, request, node, flags)
    fd = export.open_node(node, flags)
    return _opened(export, request, node, fd, flags)


def _opened(export: Export, request: Request, node: Node, fd: OwnedFd, flags: int) -> Parts:
    seen = signature(os.fstat(fd.number))
    keep = fuse.FOPEN_KEEP_CACHE if seen == node.seen else 0
    node.seen = seen
    fh = export.files.add(OpenFile(fd, node, export.identity(request), flags))
    return (fuse.fuse_open_out.pack(fh, keep, 0),)


def _open_special(export: Export, request: Request, node: Node, flags: int) -> Parts:
    had = fcntl.fcntl(node.fd, fcntl.F_GETFL) & os.O_ACCMODE
    if had not in {flags & os.O_ACCMODE, os.O_RDWR} or node.kind != stat.S_IFREG:
        raise fail(errno.EACCES)
    if flags & os.O_TRUNC:
        os.ftruncate(node.fd, 0)
    file = OpenFile(OwnedFd(os.dup(node.fd)), node, export.identity(request), flags)
    file.shares_offset = True
    return (fuse.fuse_open_out.pack(export.files.add(file), 0, 0),)


def create(export: Export, request: Request) -> Parts:
    """Answer FUSE_CREATE: make a file and open it, or open it if it is there meanwhile."""
    flags, mode, mask, _ = fields(request, fuse.fuse_create_in)
    (name,) = names(request, fuse.fuse_create_in.size)
    directory = export.nodes.fd(export.directory(request.nodeid))
    setfsuid.mask_modes(mask)
    fd = OwnedFd(os.open(name, creation_flags(flags), mode & 0o7777, dir_fd=directory))
    return _created(export, request, fd, flags)


def tmpfile(export: Export, request: Request) -> Parts:
    """Answer FUSE_TMPFILE: make and open a file without a name."""
    flags, mode, mask, _ = fields(request, fuse.fuse_create_in)
    directory = export.nodes.path(export.directory(request.nodeid))
    setfsuid.mask_modes(mask)
    # O_EXCL forbids to give it a name later.
    wanted = flags & (os.O_ACCMODE | os.O_EXCL) | os.O_TMPFILE | os.O_CLOEXEC
    fd = OwnedFd(os.open(directory, wanted, mode & 0o7777, dir_fd=export.nodes.own))
    return _created(export, request, fd, flags)


def _created(export: Export, request: Request, fd: OwnedFd, flags: int) -> Parts:
    try:
        if not stat.S_ISREG(os.fstat(fd.number).st_mode):
            # Somebody made a pipe of that name a moment ago: the host shall look again.
            raise fail(errno.ESTALE)
        node, status = export.adopt(fd)
    except OSError:
        fd.close()
        raise
    return (*export.entry_out(node, status), *_opened(export, request, node, fd, flags))


def release(export: Export, request: Request) -> Parts:
    """Answer FUSE_RELEASE and FUSE_RELEASEDIR: the last descriptor of an open file is gone."""
    fh, *_ = fields(request, fuse.fuse_release_in)
    export.locks.drop_file(export.files.remove(fh))
    return ()


def flush(export: Export, request: Request) -> Parts:
    """Answer FUSE_FLUSH: a descriptor is closed, and with it go its owner's locks of the file."""
    fh, _, _, owner = fields(request, fuse.fuse_flush_in)
    export.locks.drop(export.files.get(fh).node.nodeid, owner)
    return ()


def opendir(export: Export, request: Request) -> Parts:
    """Answer FUSE_OPENDIR. What looks empty can be opened, as the directory of home it is."""
    node = export.nodes.get(request.nodeid)
    if node.kind != stat.S_IFDIR:
        raise fail(errno.ENOTDIR)
    own, flags = export.nodes.own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = OwnedFd(os.open(export.nodes.path(node), flags, dir_fd=own))
    fh = export.files.add(OpenFile(fd, node, export.identity(request), flags))
    return (fuse.fuse_open_out.pack(fh, 0, 0),)
