"""Changing one address space into another, against a plain map of pages."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from godwit.engine import reshape
from godwit.resources.memory import Backing, VmaEntry
from godwit.resources.outline import OutlineEntry, SpaceEntry
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.process import IdentityEntry, ProcessState
from godwit.types import PAGE_SIZE

Page = tuple[object, ...]
FILES = tuple(
    PathFileEntry(path=path, mode=0o100644, uid=0, gid=0, size_bytes=1 << 20, mtime_ns=1, inode=5, birth_ns=1)
    for path in (b"/one", b"/two")
)


def vma(start: int, pages: int, kind: int, protection: int, skew: int) -> VmaEntry:
    anonymous = kind < 2
    return VmaEntry(
        start=start * PAGE_SIZE,
        end=(start + pages) * PAGE_SIZE,
        protection=protection,
        shared=kind == 3,
        backing=Backing.ANONYMOUS if anonymous else Backing.FILE,
        offset=0 if anonymous else (start + skew) * PAGE_SIZE,
        file=-1 if anonymous else kind % 2,
        reserve=kind != 1,
    )


@st.composite
def spaces(draw: st.DrawFn) -> tuple[VmaEntry, ...]:
    found: list[VmaEntry] = []
    at = 16
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 3))
        pages = draw(st.integers(1, 5))
        parts = (draw(st.integers(0, 3)), draw(st.sampled_from([1, 3])), draw(st.integers(0, 1)))
        found.append(vma(at, pages, *parts))
        at += pages
    return tuple(found)


SOMEBODY = IdentityEntry(
    pid=7,
    ppid=1,
    pgid=7,
    sid=7,
    exit_signal=17,
    state=ProcessState.RUNNING,
    wait_status=0,
    comm=b"x",
    tids=(7,),
)


def outline(vmas: tuple[VmaEntry, ...], who: IdentityEntry = SOMEBODY) -> OutlineEntry:
    return OutlineEntry(
        identities=(who,),
        spaces=(SpaceEntry(pid=7, vmas=vmas, vdso_digest=b""),),
        path_files=FILES,
        objects=(),
    )


def pages_of(vmas: tuple[VmaEntry, ...] | list[VmaEntry]) -> dict[int, Page]:
    """What each page is a page of, and its protection."""
    found: dict[int, Page] = {}
    for each in vmas:
        for at in range(each.start, each.end, PAGE_SIZE):
            place = at - each.start + each.offset if each.backing is Backing.FILE else 0
            kind = (each.backing, each.shared, each.file, place, each.reserve)
            assert at not in found
            found[at] = (*kind, each.protection)
    return found


@given(spaces(), spaces())
def test_one_space_becomes_the_other(old: tuple[VmaEntry, ...], new: tuple[VmaEntry, ...]) -> None:
    before, now = outline(old), outline(new)
    change = reshape.reshape(before, before.spaces[0], now, now.spaces[0])
    there = pages_of(old)
    for start, end in change.unmap:
        for at in range(start, end, PAGE_SIZE):
            del there[at]
    kept = dict(there)
    for start, end, protection in change.protect:
        for at in range(start, end, PAGE_SIZE):
            there[at] = (*there[at][:-1], protection)
    made = pages_of(change.map)
    assert not made.keys() & there.keys()
    assert there | made == pages_of(new)
    told = {at for start, end in change.kept for at in range(start, end, PAGE_SIZE)}
    assert told == kept.keys()
    assert change.nothing == (pages_of(old) == pages_of(new))


@given(spaces(), spaces())
def test_what_survives_is_what_is_the_same_in_both(
    old: tuple[VmaEntry, ...], new: tuple[VmaEntry, ...]
) -> None:
    kept = reshape.surviving(outline(old), outline(new))[7]
    one, other = pages_of(old), pages_of(new)
    same = {at for at in one.keys() & other.keys() if one[at][:-1] == other[at][:-1]}
    assert {at for start, end in kept for at in range(start, end, PAGE_SIZE)} == same


@given(spaces())
def test_another_family_keeps_nothing_and_other_threads_everything(old: tuple[VmaEntry, ...]) -> None:
    assert reshape.surviving(outline(old), outline(old, replace(SOMEBODY, ppid=2))) == {}
    assert reshape.surviving(outline(old), outline(old, replace(SOMEBODY, sid=1))) == {}
    threads = reshape.surviving(outline(old), outline(old, replace(SOMEBODY, tids=(7, 8, 9))))
    assert sum(end - start for start, end in threads[7]) == len(pages_of(old)) * PAGE_SIZE
