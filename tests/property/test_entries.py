"""Entries come back from their bytes as they were, and no other bytes make an entry that we would build."""

# ruff: noqa: ANN401

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import types
import typing
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.errors import GodwitError, ImageError
from godwit.images import codec
from godwit.linux.arch import MACHINE, USER_SPACE_END, UserRegs
from godwit.migrate import admit, entries, receiving
from godwit.resources import memory, registry, thread
from godwit.resources.memory import Backing, MemoryEntry, VmaEntry
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry, SpaceEntry
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.process import IdentityEntry, MachineEntry, ProcessState, TreeEntry
from godwit.resources.thread import ThreadEntry
from godwit.types import PAGE_SIZE

OUTLINE: Any = tuple[OutlineEntry, DemandEntry, ClockEntry]
FRAMES: tuple[Any, ...] = (
    entries.HeaderEntry,
    entries.HelloEntry,
    entries.VerdictEntry,
    entries.FilesEntry,
    entries.EndEntry,
    entries.ReadyEntry,
    entries.RunningEntry,
    entries.QueryEntry,
    entries.AnswerEntry,
    entries.ErrorEntry,
    OUTLINE,
    TreeEntry,
)
ENTRIES: tuple[Any, ...] = (*FRAMES, *(kind.entry for kind in registry.KINDS))
# Numbers differ in width from field to field; all fields can hold these.
numbers = st.integers(min_value=0, max_value=127)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    int: numbers,
    bool: st.booleans(),
    str: st.text(max_size=6),
    bytes: st.binary(max_size=12),
    float: st.floats(allow_nan=False, allow_infinity=False),
    type(None): st.none(),
}


@functools.cache
def values(kind: Any) -> st.SearchStrategy[Any]:
    """Return what a field of a declared type may hold."""
    if kind in LEAVES:
        return LEAVES[kind]
    if isinstance(kind, typing.NewType):
        return values(kind.__supertype__)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind, include_extras=True)
        return st.builds(kind, **{each.name: values(hints[each.name]) for each in dataclasses.fields(kind)})
    return of_alias(typing.get_origin(kind), typing.get_args(kind))


def of_alias(origin: Any, arguments: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    if origin is typing.Annotated:
        return values(arguments[0])
    if origin is tuple and arguments[-1:] == (Ellipsis,):
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    assert origin in (typing.Union, types.UnionType), f"a field of type {origin}"
    return st.one_of(*map(values, arguments))


def name_of(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)) if kind is not OUTLINE else "outline"


slow = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("kind", ENTRIES, ids=name_of)
def test_an_entry_comes_back_as_it_was(kind: Any) -> None:
    @slow
    @given(entry=values(kind))
    def check(entry: Any) -> None:
        raw = codec.encode(entry)
        assert codec.decode(raw, kind) == entry
        assert codec.encode(codec.decode(raw, kind)) == raw

    check()


@pytest.mark.parametrize("kind", ENTRIES, ids=name_of)
def test_garbage_is_refused_in_one_line(kind: Any) -> None:
    @slow
    @given(raw=st.binary(max_size=200))
    def check(raw: bytes) -> None:
        try:
            codec.decode(raw, kind)
        except ImageError as error:
            line = error.line()
            assert "\n" not in line

    check()


@pytest.mark.parametrize("kind", ENTRIES, ids=name_of)
def test_damaged_bytes_are_an_entry_or_an_image_error(kind: Any) -> None:
    @slow
    @given(entry=values(kind), data=st.data())
    def check(entry: Any, data: st.DataObject) -> None:
        raw = bytearray(codec.encode(entry))
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        with contextlib.suppress(ImageError):
            codec.decode(bytes(raw), kind)

    check()


@given(
    depth=st.integers(1, 5000),
    opener=st.sampled_from([b"\x91", b"\x81\xa1a", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff"]),
)
def test_deep_nesting_and_giant_counts_are_refused(depth: int, opener: bytes) -> None:
    for kind in ENTRIES:
        with pytest.raises(ImageError):
            codec.decode(opener * depth, kind)


def wrong_types() -> list[Any]:
    return [b"\xc0", b"\xc3", b"\x01", b"\xa1x", b"\xc4\x01x", b"\x80", b"\xcb" + bytes(8)]


@pytest.mark.parametrize("raw", wrong_types())
def test_a_value_of_another_type_is_no_header(raw: bytes) -> None:
    with pytest.raises(ImageError):
        codec.decode(raw, entries.HeaderEntry)


@given(entry=values(entries.ErrorEntry))
def test_an_error_from_a_peer_is_an_error_of_ours_or_a_bad_image(entry: entries.ErrorEntry) -> None:
    """Whatever a peer writes into it."""
    with contextlib.suppress(ImageError):
        error = entries.error_from(codec.decode(codec.encode(entry), entries.ErrorEntry))
        assert isinstance(error, GodwitError)


@pytest.mark.parametrize("survivor", ["", "both", "SOURCE", "\n"])
def test_a_survivor_that_no_peer_may_name(survivor: str) -> None:
    raw = msgspec.msgpack.encode({"kind": "MigrationError", "message": "x", "survivor": survivor})
    try:
        error = entries.error_from(codec.decode(raw, entries.ErrorEntry))
    except ImageError:
        return
    assert isinstance(error, GodwitError)


@given(tag=st.integers(0, 2**32), body=st.binary(max_size=60))
def test_an_open_file_of_any_tag_is_known_or_refused_by_number(tag: int, body: bytes) -> None:
    raw = codec.encode(entries.FilesEntry(files=(entries.FileEntry(tag=tag, body=body),)))
    known = {kind.tag for kind in registry.KINDS}
    try:
        receiving.read_files(memoryview(raw))
    except ImageError as error:
        message = error.message
        assert tag in known or f"kind {tag}" in message
    else:
        assert tag in known


# --- what no honest source sends ---------------------------------------------------------------

PATH = PathFileEntry(
    path=b"/bin/x", mode=0o100755, uid=0, gid=0, size_bytes=1, mtime_ns=1, inode=1, birth_ns=0
)


def vma(start: int, end: int, **values: Any) -> VmaEntry:
    return VmaEntry(
        start=start * PAGE_SIZE,
        end=end * PAGE_SIZE,
        protection=3,
        shared=False,
        backing=Backing.ANONYMOUS,
        **values,
    )


def identity(pid: int, ppid: int = 0, **values: Any) -> IdentityEntry:
    whole = {"pgid": 10, "sid": 10, "exit_signal": 17, "state": ProcessState.RUNNING, "tids": (pid,)}
    return IdentityEntry(pid=pid, ppid=ppid, **{**whole, **values})


VMAS = (vma(16, 18), vma(20, 24))
HONEST = OutlineEntry(
    identities=(identity(10), identity(12, 10, tids=(12, 13)), identity(14, 10, state=ProcessState.ZOMBIE)),
    spaces=(
        SpaceEntry(pid=10, vmas=VMAS, vdso_digest=b"d"),
        SpaceEntry(pid=12, vmas=VMAS, vdso_digest=b"d"),
    ),
    path_files=(PATH,),
    objects=(),
)
MACHINE_ENTRY = MachineEntry(
    hostname=b"h",
    domainname=b"",
    boot_id=b"b",
    realtime_ns=1,
    monotonic_ns=1,
    boottime_ns=1,
    page_bytes=PAGE_SIZE,
    cpu_flags=(),
)
HEADER = entries.HeaderEntry(
    migration="0" * 32,
    program=b"x",
    pid=10,
    version="1",
    architecture=MACHINE,
    machine=MACHINE_ENTRY,
    private_bytes=0,
)


def with_spaces(*vmas: VmaEntry) -> OutlineEntry:
    return replace(HONEST, spaces=(replace(HONEST.spaces[0], vmas=vmas), HONEST.spaces[1]))


DISHONEST: dict[str, OutlineEntry] = {
    "nobody": replace(HONEST, identities=(), spaces=()),
    "a pid twice": replace(HONEST, identities=(*HONEST.identities, identity(12, 10))),
    "a tid twice": replace(HONEST, identities=(identity(10, tids=(10, 13)), *HONEST.identities[1:])),
    "pid 1": replace(HONEST, identities=(identity(10), identity(1, 10), HONEST.identities[2])),
    "pid 2^22": replace(HONEST, identities=(identity(10), identity(1 << 22, 10), HONEST.identities[2])),
    "tid 2^30": replace(HONEST, identities=(identity(10, tids=(10, 1 << 30)), *HONEST.identities[1:])),
    "child before its parent": replace(
        HONEST, identities=(identity(10), identity(12, 99), HONEST.identities[2])
    ),
    "own parent": replace(HONEST, identities=(identity(10), identity(12, 12), HONEST.identities[2])),
    "no leader": replace(HONEST, identities=(identity(10, tids=()), *HONEST.identities[1:])),
    "another leader": replace(HONEST, identities=(identity(10, tids=(11, 10)), *HONEST.identities[1:])),
    "space of a zombie": replace(HONEST, spaces=(*HONEST.spaces, replace(HONEST.spaces[0], pid=14))),
    "space missing": replace(HONEST, spaces=HONEST.spaces[:1]),
    "spaces in another order": replace(HONEST, spaces=HONEST.spaces[::-1]),
    "another root": replace(HONEST, identities=(identity(11), *HONEST.identities[1:])),
    "overlap": with_spaces(vma(16, 21), vma(20, 24)),
    "backwards": with_spaces(vma(20, 24), vma(16, 18)),
    "empty mapping": with_spaces(vma(16, 16)),
    "beyond user space": with_spaces(vma(16, USER_SPACE_END // PAGE_SIZE + 1)),
    "negative": with_spaces(vma(-2, -1)),
    "unlisted file": with_spaces(vma(16, 18, file=1)),
    "unknown advice": with_spaces(vma(16, 18, advice=(4711,))),
    "negative offset": with_spaces(vma(16, 18, offset=-PAGE_SIZE)),
    "relative path": replace(HONEST, path_files=(replace(PATH, path=b"bin/x"),)),
    "path with a NUL": replace(HONEST, path_files=(replace(PATH, path=b"/bin\0x"),)),
    "session out of range": replace(HONEST, identities=(identity(10, sid=1 << 40), *HONEST.identities[1:])),
    "group out of range": replace(HONEST, identities=(identity(10, pgid=-5), *HONEST.identities[1:])),
}


def test_the_honest_outline_is_taken() -> None:
    assert admit.problem(HEADER, HONEST) == ""


@pytest.mark.parametrize("name", DISHONEST)
def test_a_dishonest_outline_is_refused_in_words(name: str) -> None:
    wrong = admit.problem(HEADER, DISHONEST[name])
    assert wrong
    assert "\n" not in wrong


@slow
@given(header=values(entries.HeaderEntry), outline=values(OutlineEntry))
def test_no_outline_breaks_the_check(header: entries.HeaderEntry, outline: OutlineEntry) -> None:
    assert isinstance(admit.problem(header, outline), str)


edges = st.integers(-1, 40)


@given(spans=st.lists(st.tuples(edges, edges), max_size=5))
def test_mappings_pass_exactly_when_they_are_apart_and_in_order(spans: list[tuple[int, int]]) -> None:
    flat = [edge for span in spans for edge in span]
    apart = (
        all(start < end for start, end in spans) and flat == sorted(flat) and all(each >= 0 for each in flat)
    )
    assert (memory.space_problem([vma(*span) for span in spans]) == "") is apart


@given(start=st.integers(0, 2**20), bits=st.integers(0, 200))
def test_mappings_are_made_of_pages_and_of_known_bits(start: int, bits: int) -> None:
    whole = replace(vma(0, 1), start=start, end=start + PAGE_SIZE, protection=bits)
    assert (memory.space_problem([whole]) == "") is (start % PAGE_SIZE == 0 and bits <= 7)


MEMORY = MemoryEntry(vmas=VMAS, layout=(0,) * 11, auxv=bytes(32), vdso_digest=b"")


def test_an_honest_address_space_is_taken() -> None:
    assert memory.problem(MEMORY) == ""


@pytest.mark.parametrize(
    "entry",
    [
        replace(MEMORY, layout=(0,) * 10),
        replace(MEMORY, layout=(0,) * 12),
        replace(MEMORY, layout=(*(0,) * 10, -1)),
        replace(MEMORY, layout=(*(0,) * 10, USER_SPACE_END + 1)),
        replace(MEMORY, auxv=bytes(31)),
        replace(MEMORY, auxv=bytes(3 * PAGE_SIZE)),
        replace(MEMORY, vmas=VMAS[::-1]),
    ],
)
def test_a_dishonest_address_space_is_refused_in_words(entry: MemoryEntry) -> None:
    assert memory.problem(entry)


THREAD = ThreadEntry(
    tid=10,
    comm=b"x",
    registers=bytes(UserRegs()),
    xstate=bytes(832),
    signal_mask=0,
    pending=(bytes(128),),
    altstack=bytes(24),
    clear_child_tid=0,
    robust_list=(0, 24),
    rseq=None,
    parent_death_signal=0,
    timer_slack_ns=50_000,
    scheduling=bytes(48),
    affinity=(0,),
    all_cpus=True,
    io_priority=0,
)


def test_an_honest_thread_is_taken() -> None:
    assert thread.problem(THREAD) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"registers": b""},
        {"registers": bytes(UserRegs()) + b"x"},
        {"xstate": bytes(100)},
        {"pending": (bytes(127),)},
        {"altstack": bytes(23)},
        {"scheduling": bytes(56)},
    ],
    ids=str,
)
def test_a_dishonest_thread_is_refused_in_words(change: dict[str, Any]) -> None:
    wrong = thread.problem(replace(THREAD, **change))
    assert "thread 10" in wrong
