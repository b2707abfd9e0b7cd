"""Requests of the host's kernel, checked: they come from a machine that may be anybody's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from struct import Struct
from typing import Any, Final, NamedTuple

from godwit.errors import ImageError
from godwit.linux import fuse
from godwit.types import OwnedFd

Parts = tuple[bytes, ...]
Identity = tuple[int, int, tuple[int, ...]]
"""uid, gid and supplementary groups."""

NAME_MAX: Final = 255
PATH_MAX: Final = 4096
_HEADER_BYTES: Final = fuse.fuse_in_header.size


class ProtocolError(ImageError):
    """The peer sends what no kernel would; there is no request to answer."""


class Request(NamedTuple):
    """One message of /dev/fuse. Its body is valid as long as the message is."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    body: memoryview


class After(NamedTuple):
    """An answer that the host may have only once it has heeded a notification.

    Both go as one message, which begins with the notification; `pump` sees to the order.
    """

    notification: Parts
    answer: Parts


class Later(NamedTuple):
    """Work that may take long, to be done by another thread, as `identity`.

    It returns the answer or raises the OSError of it. What can wait for ever is `interruptible`: it gets a
    thread of its own, and ends with EINTR when that is told to.
    """

    work: Callable[[], Parts | After]
    identity: Identity | None
    interruptible: bool = False
    held: OwnedFd | None = None  # closed when the work is done, or given up


def parse(message: bytes | memoryview) -> Request:
    """Take a message apart. Raises ProtocolError for what has no header, or another length than it says."""
    if len(message) < _HEADER_BYTES:
        raise ProtocolError(f"a file request of {len(message)} bytes")
    length, opcode, unique, nodeid, uid, gid, pid, extensions, _ = fuse.fuse_in_header.unpack_from(message)
    if length != len(message) or length > fuse.MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a file request of {len(message)} bytes that claims {length}")
    end = length - 8 * extensions
    if end < _HEADER_BYTES:
        raise ProtocolError(f"a file request of {length} bytes with {8 * extensions} of extensions")
    return Request(opcode, unique, nodeid, uid, gid, pid, memoryview(message)[_HEADER_BYTES:end])


def fields(request: Request, layout: Struct) -> tuple[Any, ...]:
    """Return the numbers at the start of the body. Raises OSError: EINVAL, there are fewer."""
    if len(request.body) < layout.size:
        raise OSError(errno.EINVAL, "short request")
    return layout.unpack_from(request.body)


def strings(request: Request, after: int, count: int = 1, longest: int = NAME_MAX) -> list[bytes]:
    """Return strings behind `after` bytes of the body.

    Raises:
        OSError: EINVAL, there are not `count` of them, each with a zero byte; ENAMETOOLONG.
    """
    found = bytes(request.body[after:]).split(b"\0", count)
    if len(found) != count + 1:
        raise OSError(errno.EINVAL, "a string without end")
    if any(len(string) > longest for string in found[:count]):
        raise OSError(errno.ENAMETOOLONG, "a name is too long")
    return found[:count]


def names(request: Request, after: int = 0, count: int = 1) -> list[bytes]:
    """Return names of directory entries behind `after` bytes of the body.

    Raises:
        OSError: EINVAL, one would lead out of its directory; ENAMETOOLONG.
    """
    found = strings(request, after, count)
    for name in found:
        if name in {b"", b".", b".."} or b"/" in name:
            raise OSError(errno.EINVAL, "no name of an entry")
    return found


def fail(number: int) -> OSError:
    """Return the error by which an operation is refused."""
    return OSError(number, os.strerror(number))
