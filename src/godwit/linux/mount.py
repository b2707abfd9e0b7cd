"""Mounts of the calling thread's mount namespace: mount(2), umount2(2), pivot_root(2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from godwit.linux import abi
from godwit.types import OwnedFd

FSOPEN_CLOEXEC: Final = 1
FSMOUNT_CLOEXEC: Final = 1
FSCONFIG_CMD_CREATE: Final = 6

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000

MNT_DETACH = 0x2


def mount(source: str | Path, target: str | Path, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Mount `source` on `target`. mount(2).

    Args:
        source: A device, a directory for MS_BIND, or any word for a file system without a device.
        target: An existing directory, or a file for a bind of a file.
        fstype: As in /proc/filesystems; empty for MS_BIND and for changes of propagation.
        flags: MS_ bits.
        data: Options of the file system itself, comma separated.

    Raises:
        OSError: With a note that names the target.
    """
    try:
        abi.syscall(
            "mount", os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(data)
        )
    except OSError as error:
        error.add_note(f"while mounting {fstype or source} on {target}")
        raise


def mount_nowhere(fstype: str) -> OwnedFd:
    """Return the root of a new mount that no path leads to, and that ends with its last descriptor.

    fsopen(2), fsmount(2), Linux 5.2; as yet without pages in the manual.
    """
    with OwnedFd(abi.syscall("fsopen", fstype.encode(), FSOPEN_CLOEXEC)) as context:
        abi.syscall("fsconfig", context.number, FSCONFIG_CMD_CREATE, 0, 0, 0)
        return OwnedFd(abi.syscall("fsmount", context.number, FSMOUNT_CLOEXEC, 0))


def bind(source: str | Path, target: str | Path, *, read_only: bool = False) -> None:
    """Make the tree at `source` visible at `target` too, without the mounts below it."""
    mount(source, target, flags=MS_BIND)
    if read_only:
        # The kernel ignores MS_RDONLY on the bind itself; it takes a second call.
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def bind_all(source: str | Path, target: str | Path) -> None:
    """Make the tree at `source` visible at `target` too, with the mounts below it."""
    mount(source, target, flags=MS_BIND | MS_REC)


def make_slave() -> None:
    """Let mounts that others make still appear, and keep those made from here on to this namespace."""
    mount("none", "/", flags=MS_REC | MS_SLAVE)


def make_private() -> None:
    """Cut propagation: what is mounted from here on is seen in this mount namespace alone."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)


def umount(target: str | Path, flags: int = 0) -> None:
    """Unmount `target`. umount2(2)."""
    abi.syscall("umount2", os.fsencode(target), flags)


def pivot_to(root: str | Path) -> None:
    """Make the mount at `root` the root, let the old root go, and stand in the new one.

    pivot_root(2) with both arguments "." stacks the old root on the new one, so that no directory
    is needed to put it in.
    """
    os.chdir(root)
    abi.syscall("pivot_root", b".", b".")
    umount(".", MNT_DETACH)
    os.chdir("/")
