"""Names: looking them up, making, moving and removing them."""

from __future__ import annotations

import errno
import os
import stat

from godwit.linux import fuse, renameat2, setfsuid
from godwit.residual.homefiles.export import Export
from godwit.residual.homefiles.messages import PATH_MAX, Parts, Request, fail, fields, names, strings
from godwit.types import Fd, OwnedFd

_LOOK: int = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def lookup(export: Export, request: Request) -> Parts:
    """Answer FUSE_LOOKUP."""
    (name,) = names(request)
    node = export.special.find(export.nodes, request.nodeid, name)
    if node is not None:
        return export.entry_out(node, os.fstat(node.fd))
    directory = export.directory(request.nodeid)
    try:
        return entry(export, export.nodes.fd(directory), name)
    except FileNotFoundError:
        return export.no_entry(directory)


def entry(export: Export, directory: Fd, name: bytes) -> Parts:
    """Return the answer that tells of an entry of a directory."""
    fd = OwnedFd(os.open(name, _LOOK, dir_fd=directory))
    status = os.fstat(fd.number)
    return export.entry_out(export.nodes.found(fd, status), status)


def mknod(export: Export, request: Request) -> Parts:
    """Answer FUSE_MKNOD: devices, pipes, sockets, and files without opening them."""
    mode, device, mask, _ = fields(request, fuse.fuse_mknod_in)
    (name,) = names(request, fuse.fuse_mknod_in.size)
    directory = export.nodes.fd(export.directory(request.nodeid))
    setfsuid.mask_modes(mask)
    os.mknod(name, mode, device, dir_fd=directory)
    return entry(export, directory, name)


def mkdir(export: Export, request: Request) -> Parts:
    """Answer FUSE_MKDIR."""
    mode, mask = fields(request, fuse.fuse_mkdir_in)
    (name,) = names(request, fuse.fuse_mkdir_in.size)
    directory = export.nodes.fd(export.directory(request.nodeid))
    setfsuid.mask_modes(mask)
    os.mkdir(name, mode & 0o7777, dir_fd=directory)
    return entry(export, directory, name)


def symlink(export: Export, request: Request) -> Parts:
    """Answer FUSE_SYMLINK."""
    name, target = strings(request, 0, 2, PATH_MAX)
    names(request._replace(body=memoryview(name + b"\0")))
    directory = export.nodes.fd(export.directory(request.nodeid))
    os.symlink(target, name, dir_fd=directory)
    return entry(export, directory, name)


def readlink(export: Export, request: Request) -> Parts:
    """Answer FUSE_READLINK."""
    node = export.nodes.get(request.nodeid)
    if node.kind != stat.S_IFLNK:
        raise fail(errno.EINVAL)
    return (os.readlink(b"", dir_fd=export.nodes.fd(node)),)


def link(export: Export, request: Request) -> Parts:
    """Answer FUSE_LINK."""
    (old,) = fields(request, fuse.fuse_link_in)
    (name,) = names(request, fuse.fuse_link_in.size)
    nodes = export.nodes
    source = nodes.path(nodes.get(old))
    directory = nodes.fd(export.directory(request.nodeid))
    os.link(source, name, src_dir_fd=nodes.own, dst_dir_fd=directory, follow_symlinks=True)
    return entry(export, directory, name)


def unlink(export: Export, request: Request) -> Parts:
    """Answer FUSE_UNLINK."""
    (name,) = names(request)
    os.unlink(name, dir_fd=export.nodes.fd(export.directory(request.nodeid)))
    return ()


def rmdir(export: Export, request: Request) -> Parts:
    """Answer FUSE_RMDIR."""
    (name,) = names(request)
    os.rmdir(name, dir_fd=export.nodes.fd(export.directory(request.nodeid)))
    return ()


def rename(export: Export, request: Request) -> Parts:
    """Answer FUSE_RENAME."""
    (to,) = fields(request, fuse.fuse_rename_in)
    return _rename(export, request, to, 0, fuse.fuse_rename_in.size)


def rename2(export: Export, request: Request) -> Parts:
    """Answer FUSE_RENAME2."""
    to, flags, _ = fields(request, fuse.fuse_rename2_in)
    return _rename(export, request, to, flags, fuse.fuse_rename2_in.size)


def _rename(export: Export, request: Request, to: int, flags: int, after: int) -> Parts:
    old, new = names(request, after, 2)
    source, target = export.directory(request.nodeid), export.directory(to)
    renameat2.rename(export.nodes.fd(source), old, export.nodes.fd(target), new, flags)
    return ()
