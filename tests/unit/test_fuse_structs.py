"""Our structures of /dev/fuse against those of <linux/fuse.h>, as the C compiler lays them out."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from godwit.linux import fuse

# The members that a structure's numbers are, in order. What a nested structure begins with stands for it.
MEMBERS = {
    "fuse_in_header": "len opcode unique nodeid uid gid pid total_extlen padding",
    "fuse_out_header": "len error unique",
    "fuse_attr": (
        "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize"
        " flags"
    ),
    "fuse_entry_out": "nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec attr",
    "fuse_attr_out": "attr_valid attr_valid_nsec dummy attr",
    "fuse_forget_in": "nlookup",
    "fuse_forget_one": "nodeid nlookup",
    "fuse_batch_forget_in": "count dummy",
    "fuse_getattr_in": "getattr_flags dummy fh",
    "fuse_setattr_in": (
        "valid padding fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode unused4 uid"
        " gid unused5"
    ),
    "fuse_mknod_in": "mode rdev umask padding",
    "fuse_mkdir_in": "mode umask",
    "fuse_rename_in": "newdir",
    "fuse_rename2_in": "newdir flags padding",
    "fuse_link_in": "oldnodeid",
    "fuse_open_in": "flags open_flags",
    "fuse_create_in": "flags mode umask open_flags",
    "fuse_open_out": "fh open_flags padding",
    "fuse_release_in": "fh flags release_flags lock_owner",
    "fuse_flush_in": "fh unused padding lock_owner",
    "fuse_read_in": "fh offset size read_flags lock_owner flags padding",
    "fuse_write_in": "fh offset size write_flags lock_owner flags padding",
    "fuse_write_out": "size padding",
    "fuse_kstatfs": "blocks bfree bavail files ffree bsize namelen frsize padding spare",
    "fuse_fsync_in": "fh fsync_flags padding",
    "fuse_setxattr_in": "size flags setxattr_flags padding",
    "fuse_getxattr_in": "size padding",
    "fuse_getxattr_out": "size padding",
    "fuse_lk_in": "fh owner lk.start lk.end lk.type lk.pid lk_flags padding",
    "fuse_file_lock": "start end type pid",
    "fuse_access_in": "mask padding",
    "fuse_init_in": "major minor max_readahead flags flags2 unused",
    "fuse_init_out": (
        "major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages"
        " map_alignment flags2 unused"
    ),
    "fuse_interrupt_in": "unique",
    "fuse_fallocate_in": "fh offset length mode padding",
    "fuse_dirent": "ino off namelen type name",
    "fuse_lseek_in": "fh offset whence padding",
    "fuse_lseek_out": "offset",
    "fuse_copy_file_range_in": "fh_in off_in nodeid_out fh_out off_out len flags",
    "fuse_notify_inval_inode_out": "ino off len",
    "fuse_notify_inval_entry_out": "parent namelen flags",
    "fuse_notify_delete_out": "parent child namelen padding",
}
# Their last member is packed by itself, or has no size.
OPEN_ENDED = {"fuse_entry_out": "fuse_attr", "fuse_attr_out": "fuse_attr", "fuse_dirent": ""}


def compiled(tmp_path: Path, expressions: list[str]) -> list[int]:
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({text}));\n' for text in expressions)
    headers = "".join(f"#include <{name}.h>\n" for name in ("stdio", "stddef", "linux/fuse"))
    source = tmp_path / "layout.c"
    source.write_text(f"{headers}int main(void) {{\n{lines}return 0;\n}}\n")
    subprocess.run(["gcc", "-o", tmp_path / "layout", source], check=True)
    printed = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout
    return [int(line) for line in printed.split()]


def offsets(layout: struct.Struct) -> list[int]:
    codes = re.findall(r"\d*[a-zA-Z]", layout.format[1:])
    return [struct.calcsize("=" + "".join(codes[:count])) for count in range(len(codes))]


@pytest.mark.requires("command:gcc")
def test_structures_are_laid_out_as_the_kernels(tmp_path: Path) -> None:
    ours, asked = [], []
    for name, members in MEMBERS.items():
        layout: struct.Struct = getattr(fuse, name)
        words = members.split()
        places = offsets(layout)
        if name in OPEN_ENDED:
            places.append(layout.size)
        assert len(places) == len(words), name
        rest = OPEN_ENDED.get(name)
        size = layout.size + (getattr(fuse, rest).size if rest else 0)
        asked += [f"sizeof(struct {name})", *(f"offsetof(struct {name}, {word})" for word in words)]
        ours += [size, *places]
    assert dict(zip(asked, ours, strict=True)) == dict(zip(asked, compiled(tmp_path, asked), strict=True))


@pytest.mark.requires("command:gcc")
def test_constants_have_the_kernels_values(tmp_path: Path) -> None:
    ours = {
        name: value for name, value in vars(fuse).items() if re.match(r"F(USE|ATTR|OPEN)_[A-Z0-9_]+$", name)
    }
    del ours["FUSE_OLDEST_MINOR_VERSION"]
    del ours["FUSE_KERNEL_MINOR_VERSION"]
    assert len(ours) > 70
    assert dict(zip(ours, compiled(tmp_path, list(ours)), strict=True)) == ours


def test_all_structures_are_compared() -> None:
    assert {name for name, value in vars(fuse).items() if isinstance(value, struct.Struct)} == set(MEMBERS)
