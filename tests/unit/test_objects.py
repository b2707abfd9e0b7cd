"""Writing a memory object's content: all of it, or an error."""

from __future__ import annotations

import errno
import os

import pytest

from godwit.resources import objects
from godwit.types import OwnedFd


def test_a_short_write_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:100], at))
    with OwnedFd(os.memfd_create("object")) as fd:
        objects.write(fd.number, memoryview(b"x" * 1050), 8)
        objects.write_zeroes(fd.number, 1000, 300)
        assert os.pread(fd.number, 2000, 0) == bytes(8) + b"x" * 992 + bytes(300)


def test_a_full_disk_is_an_error_and_no_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite

    def fills(fd: int, data: memoryview, at: int) -> int:
        if at >= 4096:
            raise OSError(errno.ENOSPC, "full")
        return whole(fd, data[: 4096 - at], at)

    monkeypatch.setattr(os, "pwrite", fills)
    with OwnedFd(os.memfd_create("object")) as fd, pytest.raises(OSError, match="full"):
        objects.write(fd.number, memoryview(bytes(8192)), 0)
