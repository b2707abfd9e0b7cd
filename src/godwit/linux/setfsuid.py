"""Acting on files as somebody else: setfsuid(2), setfsgid(2), setgroups(2), capset(2), umask(2).

The kernel keeps all of these for each thread. The C library's setgroups() sets them for the process, so the
calls are made without it. A new thread begins with the ids of the thread that made it.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from godwit.linux import abi
from godwit.linux.clone import CLONE_FS

_CAPABILITY_VERSION_3: Final = 0x20080522
_HEADER: Final = struct.Struct("=Ii")  # version pid
_DATA: Final = struct.Struct("=IIIIII")  # effective permitted inheritable, and their upper halves


class _Thread(threading.local):
    identity: tuple[int, int, tuple[int, ...]] | None = None  # None: inherited, nobody knows from whom
    mask: int | None = None


_thread = _Thread()


def become(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Have the calling thread reach files as a user with these groups, until it is told otherwise.

    As uid 0 the thread has all capabilities that the process is permitted; as any other it has none, and
    the kernel grants what it grants that user. Uids for anything but files stay as they are.

    Raises:
        PermissionError: The process is not root, and these are not its own ids.
    """
    wanted = (uid, gid, groups)
    if _thread.identity == wanted:
        return
    if os.geteuid() != 0:
        if (uid, gid) != (os.geteuid(), os.getegid()):
            abi.fail(1, "setfsuid")  # EPERM
        return
    _thread.identity = None
    _use_capabilities(every=True)
    _set_groups(groups)
    _set_checked("setfsgid", gid)
    _set_checked("setfsuid", uid)
    if uid != 0:
        _use_capabilities(every=False)
    _thread.identity = wanted


@contextmanager
def as_root() -> Iterator[None]:
    """Within `with`: the calling thread reaches files as root, if the process is root's.

    Where it acted as nobody in particular it acts as root afterwards.
    """
    before = _thread.identity
    if os.geteuid() == 0:
        become(0, 0, ())
    try:
        yield
    finally:
        if before is not None:
            become(*before)


def mask_modes(mask: int) -> None:
    """Set the calling thread's umask(2), and no other thread's."""
    if _thread.mask is None:
        abi.syscall("unshare", CLONE_FS)
    if _thread.mask != mask:
        os.umask(mask)
        _thread.mask = mask & 0o777


def _set_groups(groups: Sequence[int]) -> None:
    abi.syscall("setgroups", len(groups), (ctypes.c_uint32 * max(1, len(groups)))(*groups))


def _set_checked(name: str, number: int) -> None:
    # These two tell no error; asking for an impossible id changes nothing and returns the present one.
    abi.syscall(name, number)
    if abi.syscall(name, 0xFFFFFFFF) != number:
        abi.fail(1, name)  # EPERM


def _use_capabilities(*, every: bool) -> None:
    header = ctypes.create_string_buffer(_HEADER.pack(_CAPABILITY_VERSION_3, 0), _HEADER.size)
    data = ctypes.create_string_buffer(_DATA.size)
    abi.syscall("capget", header, data)
    _, permitted, inheritable, _, permitted_high, inheritable_high = _DATA.unpack(data.raw)
    effective, effective_high = (permitted, permitted_high) if every else (0, 0)
    data.raw = _DATA.pack(
        *(effective, permitted, inheritable),
        *(effective_high, permitted_high, inheritable_high),
    )
    abi.syscall("capset", header, data)
