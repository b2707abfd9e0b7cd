"""The program of a deputy: where its parts stand."""

from __future__ import annotations

import struct

import pytest

from godwit.linux import elf
from godwit.linux.arch import CALL_AND_WAY_BACK, DEPUTY_CALLS_AT, SIGRETURN_CODES, WAY_BACK_AT, deputy


def test_calls_and_their_way_back_stand_where_they_are_looked_for() -> None:
    code = deputy(1234, b"a name")
    assert code[DEPUTY_CALLS_AT:].startswith(CALL_AND_WAY_BACK)
    assert CALL_AND_WAY_BACK[WAY_BACK_AT:].startswith(SIGRETURN_CODES)
    assert code.endswith(b"a name".ljust(16, b"\0"))


@pytest.mark.parametrize("scratch_bytes", [0, 1 << 16])
def test_an_executable_begins_with_its_code_and_has_its_scratch_memory(scratch_bytes: int) -> None:
    content = elf.static_executable(b"the code", scratch_bytes=scratch_bytes)
    assert content[elf.entry_point(content) & 0xFFFF :] == b"the code"
    count = struct.unpack_from("<H", content, 56)[0]
    segments = [struct.unpack_from("<IIQQQQQQ", content, 64 + 56 * number) for number in range(count)]
    writable = [(each[3], each[6]) for each in segments if each[0] == elf.PT_LOAD and each[1] & 2]
    assert writable == ([(elf.SCRATCH_ADDRESS, scratch_bytes)] if scratch_bytes else [])


def test_what_is_no_executable_has_no_entry_point() -> None:
    with pytest.raises(ValueError, match="no ELF"):
        elf.entry_point(b"#!/bin/sh\n" * 10)
