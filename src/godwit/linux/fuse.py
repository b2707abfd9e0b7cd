"""The protocol of /dev/fuse, between the kernel and who serves a file system. <linux/fuse.h>, fuse(4).

Every message is a header and a body; all numbers are in the host's byte order. A structure here is one
`struct.Struct` of that name, without its last member where that has no size of its own.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Final

from godwit.linux.mount import mount, mount_nowhere
from godwit.linux.statx import device_without_asking
from godwit.types import Fd, OwnedFd

FUSE_ROOT_ID: Final = 1
FUSE_KERNEL_VERSION: Final = 7
FUSE_KERNEL_MINOR_VERSION: Final = 38
FUSE_OLDEST_MINOR_VERSION: Final = 36  # has flags2
PAGES_OF_A_MESSAGE: Final = 256  # the default of fs.fuse.max_pages_limit
MAX_WRITE_BYTES: Final = PAGES_OF_A_MESSAGE * 4096
MAX_MESSAGE_BYTES: Final = MAX_WRITE_BYTES + 4096
"""What a read of /dev/fuse may give; the kernel refuses smaller buffers."""

FUSE_LOOKUP: Final = 1
FUSE_FORGET: Final = 2
FUSE_GETATTR: Final = 3
FUSE_SETATTR: Final = 4
FUSE_READLINK: Final = 5
FUSE_SYMLINK: Final = 6
FUSE_MKNOD: Final = 8
FUSE_MKDIR: Final = 9
FUSE_UNLINK: Final = 10
FUSE_RMDIR: Final = 11
FUSE_RENAME: Final = 12
FUSE_LINK: Final = 13
FUSE_OPEN: Final = 14
FUSE_READ: Final = 15
FUSE_WRITE: Final = 16
FUSE_STATFS: Final = 17
FUSE_RELEASE: Final = 18
FUSE_FSYNC: Final = 20
FUSE_SETXATTR: Final = 21
FUSE_GETXATTR: Final = 22
FUSE_LISTXATTR: Final = 23
FUSE_REMOVEXATTR: Final = 24
FUSE_FLUSH: Final = 25
FUSE_INIT: Final = 26
FUSE_OPENDIR: Final = 27
FUSE_READDIR: Final = 28
FUSE_RELEASEDIR: Final = 29
FUSE_FSYNCDIR: Final = 30
FUSE_GETLK: Final = 31
FUSE_SETLK: Final = 32
FUSE_SETLKW: Final = 33
FUSE_ACCESS: Final = 34
FUSE_CREATE: Final = 35
FUSE_INTERRUPT: Final = 36
FUSE_DESTROY: Final = 38
FUSE_IOCTL: Final = 39
FUSE_NOTIFY_REPLY: Final = 41
FUSE_BATCH_FORGET: Final = 42
FUSE_FALLOCATE: Final = 43
FUSE_READDIRPLUS: Final = 44
FUSE_RENAME2: Final = 45
FUSE_LSEEK: Final = 46
FUSE_COPY_FILE_RANGE: Final = 47
FUSE_TMPFILE: Final = 51

FUSE_NOTIFY_INVAL_INODE: Final = 2
FUSE_NOTIFY_INVAL_ENTRY: Final = 3
FUSE_NOTIFY_DELETE: Final = 6

FUSE_ASYNC_READ: Final = 1 << 0
FUSE_POSIX_LOCKS: Final = 1 << 1
FUSE_ATOMIC_O_TRUNC: Final = 1 << 3
FUSE_BIG_WRITES: Final = 1 << 5
FUSE_DONT_MASK: Final = 1 << 6
FUSE_FLOCK_LOCKS: Final = 1 << 10
FUSE_AUTO_INVAL_DATA: Final = 1 << 12
FUSE_DO_READDIRPLUS: Final = 1 << 13
FUSE_READDIRPLUS_AUTO: Final = 1 << 14
FUSE_ASYNC_DIO: Final = 1 << 15
FUSE_PARALLEL_DIROPS: Final = 1 << 18
FUSE_POSIX_ACL: Final = 1 << 20
FUSE_MAX_PAGES: Final = 1 << 22
FUSE_CACHE_SYMLINKS: Final = 1 << 23
FUSE_HANDLE_KILLPRIV_V2: Final = 1 << 28
FUSE_SETXATTR_EXT: Final = 1 << 29
FUSE_INIT_EXT: Final = 1 << 30

FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8
FATTR_KILL_SUIDGID: Final = 1 << 11

FOPEN_KEEP_CACHE: Final = 1 << 1
FUSE_OPEN_KILL_SUIDGID: Final = 1 << 0
FUSE_WRITE_KILL_SUIDGID: Final = 1 << 2
FUSE_GETATTR_FH: Final = 1 << 0
FUSE_LK_FLOCK: Final = 1 << 0
FUSE_FSYNC_FDATASYNC: Final = 1 << 0
FUSE_SETXATTR_ACL_KILL_SGID: Final = 1 << 0
FUSE_EXPIRE_ONLY: Final = 1 << 0

fuse_in_header: Final = Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
fuse_out_header: Final = Struct("=IiQ")  # len error unique
# ino size blocks, atime mtime ctime and their ns, mode nlink uid gid rdev blksize flags
fuse_attr: Final = Struct("=QQQqqqIIIIIIIIII")
fuse_entry_out: Final = Struct("=QQQQII")  # nodeid generation entry_valid attr_valid and their ns; then attr
fuse_attr_out: Final = Struct("=QII")  # attr_valid attr_valid_nsec dummy; then attr
fuse_forget_in: Final = Struct("=Q")  # nlookup
fuse_forget_one: Final = Struct("=QQ")  # nodeid nlookup
fuse_batch_forget_in: Final = Struct("=II")  # count dummy
fuse_getattr_in: Final = Struct("=IIQ")  # getattr_flags dummy fh
# valid padding fh size lock_owner, times and their ns, mode unused4 uid gid unused5
fuse_setattr_in: Final = Struct("=IIQQQqqqIIIIIIII")
fuse_mknod_in: Final = Struct("=IIII")  # mode rdev umask padding
fuse_mkdir_in: Final = Struct("=II")  # mode umask
fuse_rename_in: Final = Struct("=Q")  # newdir
fuse_rename2_in: Final = Struct("=QII")  # newdir flags padding
fuse_link_in: Final = Struct("=Q")  # oldnodeid
fuse_open_in: Final = Struct("=II")  # flags open_flags
fuse_create_in: Final = Struct("=IIII")  # flags mode umask open_flags
fuse_open_out: Final = Struct("=QII")  # fh open_flags padding
fuse_release_in: Final = Struct("=QIIQ")  # fh flags release_flags lock_owner
fuse_flush_in: Final = Struct("=QIIQ")  # fh unused padding lock_owner
fuse_read_in: Final = Struct("=QQIIQII")  # fh offset size read_flags lock_owner flags padding
fuse_write_in: Final = Struct("=QQIIQII")  # fh offset size write_flags lock_owner flags padding
fuse_write_out: Final = Struct("=II")  # size padding
# blocks bfree bavail files ffree bsize namelen frsize padding spare
fuse_kstatfs: Final = Struct("=QQQQQIIII24x")
fuse_fsync_in: Final = Struct("=QII")  # fh fsync_flags padding
fuse_setxattr_in: Final = Struct("=IIII")  # size flags setxattr_flags padding
fuse_getxattr_in: Final = Struct("=II")  # size padding
fuse_getxattr_out: Final = Struct("=II")  # size padding
fuse_lk_in: Final = Struct("=QQQQIIII")  # fh owner, start end type pid, lk_flags padding
fuse_file_lock: Final = Struct("=QQII")  # start end type pid
fuse_access_in: Final = Struct("=II")  # mask padding
fuse_init_in: Final = Struct("=IIIII44x")  # major minor max_readahead flags flags2 unused
# major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages
# map_alignment flags2 unused
fuse_init_out: Final = Struct("=IIIIHHIIHHI28x")
fuse_interrupt_in: Final = Struct("=Q")  # unique
fuse_fallocate_in: Final = Struct("=QQQII")  # fh offset length mode padding
fuse_dirent: Final = Struct("=QQII")  # ino off namelen type; then name, padded to 8
fuse_lseek_in: Final = Struct("=QQII")  # fh offset whence padding
fuse_lseek_out: Final = Struct("=Q")  # offset
fuse_copy_file_range_in: Final = Struct("=QQQQQQQ")  # fh_in off_in nodeid_out fh_out off_out len flags
fuse_notify_inval_inode_out: Final = Struct("=Qqq")  # ino off len
fuse_notify_inval_entry_out: Final = Struct("=QII")  # parent namelen flags; then name and a zero byte
fuse_notify_delete_out: Final = Struct("=QQII")  # parent child namelen padding; then name and a zero byte


def reply(unique: int, parts: tuple[bytes, ...] = ()) -> tuple[bytes, ...]:
    """Put the header of a successful answer before the parts of its body."""
    length = fuse_out_header.size + sum(map(len, parts))
    return (fuse_out_header.pack(length, 0, unique), *parts)


def error_reply(unique: int, errno: int) -> tuple[bytes]:
    """Return the answer that makes the call fail with `errno`."""
    return (fuse_out_header.pack(fuse_out_header.size, -errno, unique),)


def notification(code: int, parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return a message that nobody asked for: its unique is zero, and its code stands for the error."""
    length = fuse_out_header.size + sum(map(len, parts))
    return (fuse_out_header.pack(length, code, 0), *parts)


def forget_content(nodeid: int) -> tuple[bytes, ...]:
    """Return the notification to drop all that is cached of a file's content and attributes."""
    return notification(FUSE_NOTIFY_INVAL_INODE, (fuse_notify_inval_inode_out.pack(nodeid, 0, 0),))


def forget_attributes(nodeid: int) -> tuple[bytes, ...]:
    """Return the notification to ask for a file's attributes and access lists anew."""
    return notification(FUSE_NOTIFY_INVAL_INODE, (fuse_notify_inval_inode_out.pack(nodeid, -1, 0),))


def forget_entry(directory: int, name: bytes) -> tuple[bytes, ...]:
    """Return the notification to look a name up anew. What is open by it, or mounted on it, stays."""
    body = fuse_notify_inval_entry_out.pack(directory, len(name), FUSE_EXPIRE_ONLY)
    return notification(FUSE_NOTIFY_INVAL_ENTRY, (body, name + b"\0"))


def padding(length: int) -> bytes:
    """Return what fills up a directory entry of `length` bytes to a multiple of 8."""
    return bytes(-length % 8)


@dataclass(frozen=True, slots=True)
class Connection:
    """Our end of a mounted file system."""

    device: OwnedFd  # not blocking, close-on-exec
    number: int  # by which fusectl knows it


def mount_new(directory: str | Path, flags: int = 0) -> Connection:
    """Mount a file system at `directory`, to be served by who holds the connection.

    Its users are checked by the kernel (`default_permissions`), and may be anyone (`allow_other`). Until
    INIT is answered, whoever touches it waits. Closing the last descriptor ends the connection: users see
    ENOTCONN.

    Raises:
        OSError: With a note that names the target.
    """
    with OwnedFd(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)) as device:
        options = f"fd={device.number},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0"
        mount("godwit", directory, "fuse", flags, f"{options},default_permissions,allow_other")
        with OwnedFd(os.open(directory, os.O_PATH | os.O_CLOEXEC)) as root:
            number = os.minor(device_without_asking(root.number))
        return Connection(device.release(), number)


def abort(number: int) -> None:
    """End a connection, whoever holds it: each call that waits for it fails with ENOTCONN.

    Raises:
        FileNotFoundError: There is no such connection any more.
    """
    with mount_nowhere("fusectl") as connections:
        path = f"{number}/abort"
        with OwnedFd(os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=connections.number)) as control:
            os.write(control.number, b"1")


def read_message(device: Fd, buffer: bytearray) -> int:
    """Read one message into `buffer` and return its length.

    Raises:
        BlockingIOError: None is there.
        FileNotFoundError: It was taken back while being read; there may be another.
        OSError: ENODEV, the file system is no longer mounted; ECONNABORTED, it was cut off.
    """
    return os.readv(device, [buffer])
