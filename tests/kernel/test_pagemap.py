"""Which pages a process has of its own, as the kernel tells it."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from godwit.linux import pagemap
from godwit.procfs import maps
from godwit.types import PAGE_SIZE, Fd, Pid

_MIB = 1 << 20


@pytest.mark.parametrize("size", [2 * _MIB, 8 * _MIB, 32 * _MIB])
@pytest.mark.parametrize("every", [2, 3, 8])
def test_each_scattered_page_is_told_once_in_rising_order(size: int, every: int) -> None:
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        touched = range(0, size // PAGE_SIZE, every)
        for page in touched:
            memory[page * PAGE_SIZE] = 1
        start = _address_of(memory)
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            runs = list(pagemap.scan_private(Fd(descriptor), start, start + size))
        finally:
            os.close(descriptor)
    assert [(first - start, last - start) for first, last in runs] == [
        (page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in touched
    ]


def _address_of(memory: mmap.mmap) -> int:
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    del anchor
    assert any(mapping.start <= address < mapping.end for mapping in maps.read_maps(Pid(os.getpid())))
    return address
