"""Files and directories opened again: read on from where they were."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from godwit.linux import abi
from godwit.resources import pathfile, regular
from godwit.resources.regular import RegularEntry
from godwit.types import Fd, FileId, OwnedFd
from tests.kernel.openfiles import Builder

ENTRIES = 200


def entries(fd: Fd) -> int:
    """Read on in a directory to its end; return how many entries there were."""
    buffer, found = (ctypes.c_char * 160)(), 0
    while (length := abi.syscall("getdents64", fd, buffer, len(buffer))) > 0:
        raw, at = buffer.raw[:length], 0
        while at < length:
            at += int.from_bytes(raw[at + 16 : at + 18], "little")
            found += 1
    return found


@pytest.mark.parametrize("read", [0, 1, 3, ENTRIES])
def test_a_directory_is_read_on_and_can_be_rewound(tmp_path: Path, read: int) -> None:
    for number in range(ENTRIES):
        (tmp_path / f"e{number:03}").touch()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    buffer, before = (ctypes.c_char * 160)(), 0
    for _ in range(read):
        before += abi.syscall("getdents64", fd, buffer, len(buffer)) // 24  # of such short names
    with OwnedFd(fd):
        where = os.lseek(fd, 0, os.SEEK_CUR)
        file = pathfile.describe(Fd(fd), bytes(tmp_path), content=False)
    entry = RegularEntry(file_id=FileId(1), flags=os.O_RDONLY | os.O_DIRECTORY, offset=where, file=file)
    with regular.restore(entry, Builder())[FileId(1)] as mine:
        assert entries(mine.number) == ENTRIES + 2 - before
        os.lseek(mine.number, 0, os.SEEK_SET)
        assert entries(mine.number) == ENTRIES + 2
