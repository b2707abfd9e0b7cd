"""Open memfds move as open file descriptions of a shared memory object."""

from __future__ import annotations

import os

import pytest

from godwit.errors import ImageError
from godwit.resources import memfd
from godwit.resources.base import Disposition
from godwit.resources.memfd import MemfdEntry
from godwit.types import FileId, OwnedFd
from tests.kernel.openfiles import Builder, flags_shown, held, moved, restored, same


def test_two_open_files_of_one_memfd_share_content_but_not_offset() -> None:
    first = os.memfd_create("notes")
    os.write(first, b"0123456789")
    second = os.open(f"/proc/self/fd/{first}", os.O_RDONLY)
    os.lseek(second, 4, os.SEEK_SET)
    content = OwnedFd(os.memfd_create("notes"))
    os.write(content.number, b"0123456789")
    inode = os.fstat(first).st_ino
    with held(first, second) as child, restored(memfd.KIND, child, {inode: content}) as builder:
        assert memfd.inspect(child.at(first), child).disposition is Disposition.MOVE
        for fd in (first, second):
            with child.twin(fd) as twin:
                same(flags_shown, moved(child, builder, fd), twin)
                same(lambda fd: os.lseek(fd.number, 0, os.SEEK_CUR), moved(child, builder, fd), twin)
        os.write(moved(child, builder, first).number, b"ab")
        assert os.read(moved(child, builder, second).number, 99) == b"456789ab"
        assert os.readlink(f"/proc/self/fd/{moved(child, builder, first).number}") == "/memfd:notes (deleted)"


@pytest.mark.parametrize(("offset", "flags"), [(-1, 0), (2**63, 0), (0, os.O_TRUNC)])
def test_an_impossible_memfd_from_a_peer_is_refused(offset: int, flags: int) -> None:
    entry = MemfdEntry(file_id=FileId(1), object_id=1, offset=offset, flags=flags)
    with pytest.raises(ImageError):
        memfd.restore(entry, Builder())


def test_a_memfd_of_huge_pages_is_refused() -> None:
    try:
        fd = os.memfd_create("huge", os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no huge pages: {error}")
    with held(fd) as child:
        finding = memfd.inspect(child.at(fd), child)
        assert (finding.disposition, "huge pages" in finding.why) == (Disposition.REFUSE, True)
