"""maps and smaps: text of the kernel, and the mappings of the test itself."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from godwit.procfs import maps
from godwit.types import Pid

ME = Pid(os.getpid())
SMAPS = (
    "563b0324e000-563b03250000 r--p 00002000 fe:0a 260386                     /usr/bin/head\n"
    "Size:                  8 kB\nKernelPageSize:        4 kB\nRss:                   8 kB\n"
    "Anonymous:             4 kB\nSwap:                 12 kB\nLocked:                0 kB\n"
    "THPeligible:           0\nProtectionKey:         3\nVmFlags: rd mr mw me \n"
    "7ffd1000-7ffd3000 rw-s 00000000 00:01 77  /memfd:a b (deleted)\nRss:  0 kB\nVmFlags: rd wr sh \n"
)


def test_a_line_of_maps_is_read_whole() -> None:
    (found,) = maps.parse_maps("7f00-8f00 r-xs 0001f000 fe:0a 2146583                    /a/b c\n")
    assert (found.start, found.end, found.offset) == (0x7F00, 0x8F00, 0x1F000)
    assert (found.dev_major, found.dev_minor, found.inode, found.path) == (0xFE, 0x0A, 2146583, "/a/b c")
    assert found.length_bytes == 0x1000
    assert found.readable
    assert not found.writable
    assert found.executable
    assert found.shared
    assert not found.deleted


@pytest.mark.parametrize(
    ("shown", "path"),
    [
        ("", ""),
        ("[heap]", "[heap]"),
        ("[anon:name with  spaces]", "[anon:name with  spaces]"),
        ("/a\\012b", "/a\nb"),
        ("/a\\040b\\x", "/a\\040b\\x"),  # only newlines are escaped here
        ("/a\rb\x0cc\u2028d", "/a\rb\x0cc\u2028d"),
        ("/ends in space ", "/ends in space "),
    ],
)
def test_a_path_is_what_the_kernel_meant(shown: str, path: str) -> None:
    padding = " " * 20 if shown else ""
    (found,) = maps.parse_maps(f"1000-2000 rw-p 00000000 00:00 0 {padding}{shown}\n")
    assert found.path == path


@pytest.mark.parametrize(
    "line", ["hello", "2000-1000 rw-p 0 00:00 0", "1000-2000 rwp 0 0:0 0", "1-2 rw-p 0 0 0"]
)
def test_a_damaged_line_is_shown(line: str) -> None:
    with pytest.raises(ValueError, match=f"maps: no mapping: '{line[:5]}"):
        maps.parse_maps(line)


def test_smaps_adds_flags_and_sizes() -> None:
    first, second = maps.parse_smaps(SMAPS)
    assert first.flags == {"rd", "mr", "mw", "me"}
    assert (first.rss_bytes, first.anonymous_bytes, first.swap_bytes) == (8192, 4096, 12288)
    assert (first.locked_bytes, first.page_size_bytes, first.protection_key) == (0, 4096, 3)
    assert (second.path, second.deleted, second.shared) == ("/memfd:a b (deleted)", True, True)
    assert second.flags == {"rd", "wr", "sh"}
    assert (second.anonymous_bytes, second.protection_key) == (0, 0)


def test_a_detail_without_a_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="smaps"):
        maps.parse_smaps("Rss: 8 kB\n")


TORN = "7f00000-7f03000 rw-p 0 00:00 0\n7f02000-7f04000 rw-p 0 00:00 0\n"
WHOLE = "7f00000-7f02000 rw-p 0 00:00 0\n7f02000-7f04000 rw-p 0 00:00 0\n"


@pytest.mark.parametrize("read", [maps.read_maps, maps.read_smaps])
def test_a_list_that_the_program_changed_meanwhile_is_read_again(
    read: Callable[[Pid], tuple[maps.Mapping, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter([TORN, TORN, WHOLE])
    monkeypatch.setattr("godwit.procfs.source.read_text", lambda *_, **__: next(texts))
    assert [mapping.end for mapping in read(ME)] == [0x7F02000, 0x7F04000]
    monkeypatch.setattr("godwit.procfs.source.read_text", lambda *_, **__: TORN)
    with pytest.raises(FileNotFoundError, match="faster"):
        read(ME)


def test_own_mapping_of_a_file_is_found_in_both(tmp_path: Path) -> None:
    path = tmp_path / "a b\n\udcff"
    path.write_bytes(b"x" * 8192)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as view:
        view[0] = 1
        for found in (maps.read_maps(ME), maps.read_smaps(ME)):
            (mine,) = [mapping for mapping in found if mapping.path == str(path)]
            place = os.fstat(file.fileno())
            assert mine.inode == place.st_ino
            assert os.makedev(mine.dev_major, mine.dev_minor) == place.st_dev
            assert mine.shared
            assert mine.length_bytes == 8192
        assert mine.rss_bytes > 0
        path.unlink()
        (mine,) = [mapping for mapping in maps.read_maps(ME) if mapping.inode == place.st_ino]
        assert mine.deleted
