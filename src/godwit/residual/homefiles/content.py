"""What is in a file: pread(2), pwrite(2), fsync(2), fallocate(2), lseek(2), copy_file_range(2)."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from godwit.linux import fallocate as falloc
from godwit.linux import fuse, setfsuid
from godwit.residual.homefiles.export import Export
from godwit.residual.homefiles.files import OpenFile
from godwit.residual.homefiles.messages import Later, Parts, Request, fail, fields
from godwit.residual.homefiles.nodes import signature
from godwit.types import OwnedFd

_LONGEST_COPY_BYTES: Final = 16 << 20


def read(export: Export, request: Request) -> Parts:
    """Answer FUSE_READ."""
    fh, offset, size, *_ = fields(request, fuse.fuse_read_in)
    if size > fuse.MAX_WRITE_BYTES:
        raise fail(errno.EINVAL)
    return (os.pread(export.files.get(fh).fd.number, size, offset),)


def write(export: Export, request: Request) -> Parts:
    """Answer FUSE_WRITE."""
    fh, offset, size, flags, *_ = fields(request, fuse.fuse_write_in)
    data = request.body[fuse.fuse_write_in.size :]
    if len(data) != size:
        raise fail(errno.EINVAL)
    file = export.files.get(fh)
    # As who opened it: pages of a mapping come from the kernel itself, which is nobody of the job.
    setfsuid.become(*file.identity)
    if flags & fuse.FUSE_WRITE_KILL_SUIDGID and file.identity[0] == 0:
        _kill_privileges(file)
    before = os.fstat(file.fd.number)
    if file.appends and before.st_size != offset:
        # It lands elsewhere than the host thinks.
        export.notify(fuse.forget_content(file.node.nodeid))
    done = os.pwrite(file.fd.number, data, offset)
    if signature(before) == file.node.seen:
        file.node.seen = signature(os.fstat(file.fd.number))
    return (fuse.fuse_write_out.pack(done, 0),)


def _kill_privileges(file: OpenFile) -> None:
    # Root at the host without CAP_FSETID; home's kernel does it for everybody else.
    mode = os.fstat(file.fd.number).st_mode
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        kept &= ~stat.S_ISGID
    if kept != mode:
        os.fchmod(file.fd.number, stat.S_IMODE(kept))


def fsync(export: Export, request: Request) -> Later:
    """Answer FUSE_FSYNC and FUSE_FSYNCDIR."""
    fh, flags, _ = fields(request, fuse.fuse_fsync_in)
    fd = export.files.duplicate(fh)
    sync = os.fdatasync if flags & fuse.FUSE_FSYNC_FDATASYNC else os.fsync

    def work() -> Parts:
        with fd:
            sync(fd.number)
        return ()

    return Later(work, None)


def fallocate(export: Export, request: Request) -> Later:
    """Answer FUSE_FALLOCATE."""
    fh, offset, length, mode, _ = fields(request, fuse.fuse_fallocate_in)
    identity = export.files.get(fh).identity
    fd = export.files.duplicate(fh)

    def work() -> Parts:
        with fd:
            falloc.fallocate(fd.number, mode, offset, length)
        return ()

    return Later(work, identity)


def lseek(export: Export, request: Request) -> Parts:
    """Answer FUSE_LSEEK, of which the host's kernel asks only SEEK_DATA and SEEK_HOLE."""
    fh, offset, whence, _ = fields(request, fuse.fuse_lseek_in)
    if whence not in {os.SEEK_DATA, os.SEEK_HOLE}:
        raise fail(errno.EINVAL)
    file = export.files.get(fh)
    if not file.shares_offset:
        return (fuse.fuse_lseek_out.pack(os.lseek(file.fd.number, offset, whence)),)
    with OwnedFd(os.open(b"%d" % file.fd.number, os.O_RDONLY | os.O_CLOEXEC, dir_fd=export.nodes.own)) as fd:
        return (fuse.fuse_lseek_out.pack(os.lseek(fd.number, offset, whence)),)


def copy_file_range(export: Export, request: Request) -> Later:
    """Answer FUSE_COPY_FILE_RANGE. A short copy is gone on with by the program."""
    source_fh, source_at, _, target_fh, target_at, length, flags = fields(
        request, fuse.fuse_copy_file_range_in
    )
    if flags:
        raise fail(errno.EINVAL)
    identity = export.files.get(target_fh).identity
    source, target = export.files.duplicate(source_fh), export.files.duplicate(target_fh)

    def work() -> Parts:
        with source, target:
            count = min(length, _LONGEST_COPY_BYTES)
            done = os.copy_file_range(source.number, target.number, count, source_at, target_at)
        return (fuse.fuse_write_out.pack(done, 0),)

    return Later(work, identity)
