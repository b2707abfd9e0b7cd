"""What a file is: stat(2), chmod(2), chown(2), truncate(2), utimensat(2), statfs(2), access(2)."""

from __future__ import annotations

import os
from typing import Final

from godwit.linux import fuse, utimens
from godwit.residual.homefiles.export import Export
from godwit.residual.homefiles.messages import Parts, Request, fields
from godwit.residual.homefiles.nodes import Node

_OWNER: Final = fuse.FATTR_UID | fuse.FATTR_GID
_TIMES: Final = fuse.FATTR_ATIME | fuse.FATTR_MTIME


def getattr_(export: Export, request: Request) -> Parts:
    """Answer FUSE_GETATTR."""
    node = export.nodes.get(request.nodeid)
    flags, _, fh = fields(request, fuse.fuse_getattr_in)
    if flags & fuse.FUSE_GETATTR_FH and fh in export.files:
        return export.attr_out(node, os.fstat(export.files.get(fh).fd.number))
    return export.attr_out(node, os.fstat(export.nodes.fd(node)))


def setattr_(export: Export, request: Request) -> Parts:
    """Answer FUSE_SETATTR: change, in the order of the kernel, what is asked for, and return the result."""
    values = fields(request, fuse.fuse_setattr_in)
    valid, _, fh, size = values[:4]
    node = export.nodes.get(request.nodeid)
    path, own = export.nodes.path(node), export.nodes.own
    if valid & _OWNER:
        uid = values[13] if valid & fuse.FATTR_UID else -1
        gid = values[14] if valid & fuse.FATTR_GID else -1
        os.chown(path, uid, gid, dir_fd=own)
    if valid & fuse.FATTR_MODE:
        os.chmod(path, values[11] & 0o7777, dir_fd=own)
    if valid & fuse.FATTR_SIZE:
        _truncate(export, node, size, fh if valid & fuse.FATTR_FH else None)
    if valid & _TIMES:
        access = (values[5], values[8]) if valid & fuse.FATTR_ATIME else None
        modification = (values[6], values[9]) if valid & fuse.FATTR_MTIME else None
        utimens.set_times(
            own,
            path,
            utimens.NOW if valid & fuse.FATTR_ATIME_NOW else access,
            utimens.NOW if valid & fuse.FATTR_MTIME_NOW else modification,
        )
    return export.attr_out(node, os.fstat(export.nodes.fd(node)))


def _truncate(export: Export, node: Node, size: int, fh: int | None) -> None:
    if fh is not None and fh in export.files:
        os.ftruncate(export.files.get(fh).fd.number, size)
    elif node.special:
        os.ftruncate(node.fd, size)
    else:
        with export.open_node(node, os.O_WRONLY) as fd:
            os.ftruncate(fd.number, size)


def statfs_(export: Export, request: Request) -> Parts:
    """Answer FUSE_STATFS."""
    at = os.fstatvfs(export.nodes.fd(export.nodes.get(request.nodeid)))
    sizes = (at.f_bsize, at.f_namemax, at.f_frsize, 0)
    return (fuse.fuse_kstatfs.pack(at.f_blocks, at.f_bfree, at.f_bavail, at.f_files, at.f_ffree, *sizes),)


def access(export: Export, request: Request) -> Parts:
    """Answer FUSE_ACCESS."""
    mask, _ = fields(request, fuse.fuse_access_in)
    nodes = export.nodes
    path = nodes.path(nodes.get(request.nodeid))
    if not os.access(path, mask & 7, dir_fd=nodes.own, effective_ids=True):
        raise PermissionError(13, "access")
    return ()
