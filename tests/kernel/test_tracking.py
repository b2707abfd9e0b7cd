"""What a program has written since the last scan, told from outside and without its help."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from godwit.engine import freeze, ranges, tracking, view
from godwit.engine.ranges import Range
from godwit.engine.tracking import Changes, Watch
from godwit.engine.view import ProcessView
from godwit.linux import mem
from godwit.types import PAGE_SIZE, Pid
from tests.conftest import requires

pytestmark = [requires("root")]

MADV_GUARD_INSTALL = 102

# Does what it is told, a line at a time, in an array of 64 pages; answers with addresses.
PROGRAM = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mremap.restype = ctypes.c_void_p
P = 4096
def fresh(pages, fd=-1, at=0):
    kind = mmap.MAP_PRIVATE | (0 if fd >= 0 else mmap.MAP_ANONYMOUS) | (0x10 if at else 0)
    found = libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(pages * P), 3, kind, fd, 0)
    assert found != ctypes.c_void_p(-1).value
    return found
def write(at, byte=1): ctypes.memset(at, byte, 1)
def read(at): return ctypes.string_at(at, 1)
def forget(at, pages): assert libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(pages * P), 4) == 0
def unmap(at, pages): assert libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(pages * P)) == 0
def move(at, pages, to):
    assert libc.mremap(ctypes.c_void_p(at), ctypes.c_size_t(pages * P), ctypes.c_size_t(pages * P), 3,
                       ctypes.c_void_p(to)) == to
print("ready", flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


@dataclass
class Told:
    """A program under watch, and what it answers."""

    process: subprocess.Popen[str]
    watch: Watch

    def do(self, words: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def number(self, words: str) -> int:
        return int(self.do(words))

    def look(self) -> ProcessView:
        memory = view.Memory(tracked=True)
        tree, _ = view.settled(Pid(self.process.pid), memory, lambda _: None)
        self.watch.update(tree.root.pid, tree.processes, tree.gadgets_of)
        return tree.root

    def scan(self, *, protect: bool = True) -> Changes:
        seen = self.look()
        tracked = self.watch.of(seen)
        assert tracked is not None
        return tracked.scan(tracking.spans_of(seen), tracking.backed_of(seen), protect=protect)


@pytest.fixture
def told() -> Iterator[Told]:
    words = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watch = Watch()
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield Told(process, watch)
        finally:
            watch.close()
            process.kill()


def pages(found: list[Range], at: int, count: int = 64) -> list[int]:
    """Number the pages of the array that are in the ranges."""
    inside = ranges.intersect(ranges.union(found), [(at, at + count * PAGE_SIZE)])
    return [(page - at) // PAGE_SIZE for start, end in inside for page in range(start, end, PAGE_SIZE)]


def page(at: int, number: int) -> int:
    return at + number * PAGE_SIZE


def test_the_first_scan_tells_everything_and_the_next_what_was_written(told: Told) -> None:
    at = told.number("fresh(64)")
    for number in (3, 4, 40):
        told.do(f"write({page(at, number)})")
    assert pages(told.scan().dirty, at) == [3, 4, 40]
    assert pages(told.scan().dirty, at) == []
    told.do(f"write({page(at, 4)}, 2)")
    told.do(f"write({page(at, 50)})")
    assert pages(told.scan().dirty, at) == [4, 50]
    assert pages(told.scan().dirty, at) == []


def test_a_page_given_up_is_told_as_gone_once(told: Told) -> None:
    at = told.number("fresh(64)")
    told.do(f"write({page(at, 7)})")
    told.scan()
    told.do(f"forget({page(at, 7)}, 1)")
    found = told.scan()
    assert (pages(found.gone, at), pages(found.dirty, at)) == ([7], [])
    assert pages(told.scan().gone, at) == []
    told.do(f"read({page(at, 7)})")
    assert pages(told.scan().dirty, at) == []
    told.do(f"write({page(at, 7)})")
    assert pages(told.scan().dirty, at) == [7]
    told.do(f"forget({page(at, 7)}, 1)")
    assert pages(told.scan().gone, at) == [7]


def test_a_range_mapped_anew_is_told_from_the_start(told: Told) -> None:
    at = told.number("fresh(64)")
    told.do(f"write({page(at, 1)}) or write({page(at, 9)})")
    told.do(f"write({page(at, 9)})")
    told.scan()
    told.do(f"unmap({at}, 64)")
    assert told.number(f"fresh(64, at={at})") == at
    told.do(f"write({page(at, 9)}, 5)")
    found = told.scan()
    assert pages(found.gone, at) == list(range(64))
    assert pages(found.dirty, at) == [9]
    told.do(f"write({page(at, 10)})")
    assert pages(told.scan().dirty, at) == [10]


def test_what_mremap_moves_is_told_where_it_is_now(told: Told) -> None:
    at, to = told.number("fresh(64)"), told.number("fresh(64)")
    told.do(f"write({page(at, 2)})")
    told.scan()
    told.do(f"move({at}, 64, {to})")
    found = told.scan()
    assert pages(found.dirty, to) == [2]
    told.do(f"write({page(to, 3)})")
    assert pages(told.scan().dirty, to) == [3]


def test_a_page_over_a_file_shows_the_file_again(
    told: Told, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("over") / "file"
    file.write_bytes(b"f" * 64 * PAGE_SIZE)
    at = told.number(f"fresh(64, os.open({str(file)!r}, os.O_RDONLY))")
    told.do(f"[write({page(at, 5)}), read({page(at, 6)}), write({page(at, 20)})]")
    assert pages(told.scan().dirty, at) == [5, 20]
    # The kernel leaves a marker, which looks like a page that is swapped out: it is told again, or as gone.
    told.do(f"forget({page(at, 5)}, 1)")
    found = told.scan()
    assert 5 in pages(found.gone, at) + pages(found.dirty, at)
    told.do(f"read({page(at, 5)})")
    found = told.scan()
    assert pages(found.gone, at) == [5]
    assert pages(found.dirty, at) == []
    assert told.do(f"read({page(at, 5)})") == "b'f'"


@pytest.mark.parametrize("protect", [True, False])
def test_a_last_scan_tells_as_much_and_changes_nothing(told: Told, protect: bool) -> None:
    at = told.number("fresh(64)")
    told.do(f"write({page(at, 8)})")
    told.scan()
    told.do(f"[write({page(at, 9)}), forget({page(at, 8)}, 1)]")
    seen = told.look()
    with freeze.frozen(seen.pid):
        tracked = told.watch.of(seen)
        assert tracked is not None
        found = tracked.scan(tracking.spans_of(seen), tracking.backed_of(seen), protect=protect)
    assert (pages(found.dirty, at), pages(found.gone, at)) == ([9], [8])


def test_the_kernel_writing_for_the_program_counts(told: Told) -> None:
    at = told.number("fresh(64)")
    told.do(f"write({page(at, 30)})")
    told.scan()
    told.do(f"os.preadv(os.open('/dev/zero', 0), [(ctypes.c_char * 9).from_address({page(at, 30)})], 0)")
    assert pages(told.scan().dirty, at) == [30]


def test_another_program_in_its_place_is_watched_from_the_start(told: Told) -> None:
    before = told.look()
    assert told.watch.of(before) is not None
    assert told.do(f"os.execv({sys.executable!r}, ['python', '-c', {PROGRAM!r}])") == "ready"
    at = told.number("fresh(64)")
    told.do(f"write({page(at, 3)})")
    assert pages(told.scan().dirty, at) == [3]
    assert told.watch.of(before) is None


def test_the_end_of_a_watch_leaves_no_trace(told: Told) -> None:
    told.scan()
    told.watch.close()
    smaps = (f"/proc/{told.process.pid}/smaps", f"/proc/{told.process.pid}/fd")
    with open(smaps[0], encoding="utf-8") as file:
        assert not [line for line in file if line.startswith("VmFlags") and " uw" in line]
    assert not [link for link in map(_target(smaps[1]), os.listdir(smaps[1])) if "userfaultfd" in link]


def _target(directory: str) -> Callable[[str], str]:
    return lambda name: os.readlink(f"{directory}/{name}")


def test_a_huge_reservation_costs_no_page_tables(told: Told) -> None:
    at = told.number("libc.mmap(None, ctypes.c_size_t(1 << 40), 3, 0x4022, -1, 0)")
    told.do(f"[write({at}), write({at + (1 << 39)})]")
    assert pages(told.scan().dirty, at, 1 << 28) == [0, 1 << 27]
    told.do(f"write({at + (1 << 38)})")
    assert pages(told.scan().dirty, at, 1 << 28) == [1 << 26]
    with open(f"/proc/{told.process.pid}/status", encoding="utf-8") as file:
        tables_kib = next(int(line.split()[1]) for line in file if line.startswith("VmPTE"))
    assert tables_kib < 4096


def test_a_read_only_buffer_has_an_address_too() -> None:
    content = bytes(range(256)) * 16
    with mmap.mmap(-1, PAGE_SIZE) as target:
        address = mem.address_of(memoryview(target))
        runs = [(address, address + PAGE_SIZE)]
        with mem.open_memory(Pid(os.getpid())) as memory:
            mem.write_all(Pid(os.getpid()), memory, runs, memoryview(content)[:PAGE_SIZE])
        assert target[:] == content


def test_a_page_that_came_up_right_before_the_last_scan_can_go_again(told: Told) -> None:
    at = told.number("fresh(64)")
    told.do(f"write({page(at, 1)})")
    told.scan()
    told.do(f"write({page(at, 7)})")
    assert pages(told.scan(protect=False).dirty, at) == [7]
    told.do(f"forget({page(at, 7)}, 1)")
    # An image that goes on from what the last scan told.
    assert pages(told.scan().gone, at) == [7]


def test_guard_pages_made_since_the_watch_began_are_found(told: Told) -> None:
    before = told.number("fresh(64)")
    told.do(f"write({before})")
    told.scan()
    seen = told.look()
    tracked = told.watch.of(seen)
    assert tracked is not None
    assert tracked.guarded(tracking.spans_of(seen)) is None
    at = told.number("fresh(64)")
    words = f"libc.madvise(ctypes.c_void_p({page(at, 3)}), ctypes.c_size_t(P), {MADV_GUARD_INSTALL})"
    if told.number(words):
        pytest.skip("this kernel lacks guard pages (Linux 6.13)")
    found = tracked.guarded(tracking.spans_of(told.look()))
    assert found is not None
    assert found[0] <= page(at, 3) < found[1]
