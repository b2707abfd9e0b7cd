"""statfs(2): which file system a file is on, as far as two machines can compare."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from godwit.linux import abi
from godwit.types import Fd

_STATFS: Final = struct.Struct("<7q8s56x")  # type, five counts and two of nodes, fsid
# <linux/magic.h>, and of those that are not in it: file systems that several machines may mount at once.
_OF_SEVERAL_MACHINES: Final = frozenset(
    {
        0x6969,  # NFS
        0xFE534D42,  # SMB 2 and 3
        0xFF534D42,  # CIFS
        0x517B,  # SMB
        0x65735546,  # FUSE, virtiofs
        0x01021997,  # 9P
        0x00C36400,  # Ceph
        0x01161970,  # GFS2
        0x7461636F,  # OCFS2
        0x5346414F,  # AFS
        0x0BD00BD0,  # Lustre
        0x47504653,  # GPFS
    }
)


def file_system(fd: Fd) -> tuple[int, bytes]:
    """Return type and id of the file system that an open file is on."""
    buffer = (ctypes.c_char * _STATFS.size)()
    abi.syscall("fstatfs", fd, buffer)
    kind, *_, ident = _STATFS.unpack(bytes(buffer))
    return int(kind), bytes(ident)


def may_be_shared(kind: int) -> bool:
    """Tell whether a file system of this type can be mounted by several machines at once."""
    return kind in _OF_SEVERAL_MACHINES
