"""Extended attributes and access control lists: xattr(7), acl(5)."""

from __future__ import annotations

import errno
import os
from typing import Final

from godwit.linux import fuse
from godwit.residual.homefiles.export import Export
from godwit.residual.homefiles.messages import Parts, Request, fail, fields, strings

_LONGEST_BYTES: Final = 65536  # XATTR_SIZE_MAX, XATTR_LIST_MAX
# What root alone may set, and for trusted attributes see, whatever the kernel at the host lets pass.
_SET_BY_ROOT: Final = (b"security.", b"trusted.")
_SEEN_BY_ROOT: Final = b"trusted."


def getxattr(export: Export, request: Request) -> Parts:
    """Answer FUSE_GETXATTR. With no room given it tells the size."""
    size, _ = fields(request, fuse.fuse_getxattr_in)
    (name,) = strings(request, fuse.fuse_getxattr_in.size)
    if name.startswith(_SEEN_BY_ROOT) and request.uid != 0:
        raise fail(errno.ENODATA)
    return _sized(os.getxattr(_path(export, request), name), size)


def listxattr(export: Export, request: Request) -> Parts:
    """Answer FUSE_LISTXATTR. With no room given it tells the size."""
    size, _ = fields(request, fuse.fuse_getxattr_in)
    listed = map(os.fsencode, os.listxattr(_path(export, request)))
    seen = [name for name in listed if request.uid == 0 or not name.startswith(_SEEN_BY_ROOT)]
    return _sized(b"".join(name + b"\0" for name in seen), size)


def _path(export: Export, request: Request) -> bytes:
    return b"/proc/self/fd/" + export.nodes.path(export.nodes.get(request.nodeid))


def _sized(value: bytes, size: int) -> Parts:
    if size == 0:
        return (fuse.fuse_getxattr_out.pack(len(value), 0),)
    if len(value) > size:
        raise fail(errno.ERANGE)
    return (value,)


def setxattr(export: Export, request: Request) -> Parts:
    """Answer FUSE_SETXATTR."""
    size, flags, _, _ = fields(request, fuse.fuse_setxattr_in)
    (name,) = strings(request, fuse.fuse_setxattr_in.size)
    start = fuse.fuse_setxattr_in.size + len(name) + 1
    value = bytes(request.body[start : start + size])
    if len(value) != size or size > _LONGEST_BYTES:
        raise fail(errno.EINVAL)
    _check(request, name)
    os.setxattr(_path(export, request), name, value, flags)
    return ()


def removexattr(export: Export, request: Request) -> Parts:
    """Answer FUSE_REMOVEXATTR."""
    (name,) = strings(request, 0)
    _check(request, name)
    os.removexattr(_path(export, request), name)
    return ()


def _check(request: Request, name: bytes) -> None:
    if name.startswith(_SET_BY_ROOT) and request.uid != 0:
        raise fail(errno.EPERM)
