"""What no text may do to the parsers of /proc, and what they must give back."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.procfs import (
    auxv,
    cpuinfo,
    fdinfo,
    limits,
    maps,
    mountinfo,
    sched,
    source,
    stat,
    status,
    timens,
    timers,
)

PARSERS: tuple[Callable[[str], object], ...] = (
    stat.parse,
    status.parse,
    maps.parse_maps,
    maps.parse_smaps,
    fdinfo.parse,
    mountinfo.parse,
    timers.parse,
    limits.parse,
    timens.parse,
    sched.parse_exec_start_ns,
    cpuinfo.parse,
)
SAMPLES = (
    "1 (a) R (b) R " + " ".join(["1"] * 49),
    "Name:\tx\nState:\tR (running)\nTgid:\t1\nPid:\t1\nPPid:\t0\nTracerPid:\t0\nUid:\t0\t0\t0\t0\n",
    "1000-2000 rw-p 00000000 fe:00 77   /a (deleted)\nRss:  4 kB\nVmFlags: rd wr\n",
    "pos:\t0\nflags:\t02\nmnt_id:\t1\nlock:\t1: FLOCK  ADVISORY  READ 1 fe:00:7 0 EOF\n",
    "pos:\t0\nflags:\t02\nmnt_id:\t1\ntfd:  4 events:  19 data:  4  pos:0 ino:1a66 sdev:9\n",
    "pos:\t0\nflags:\t02\nmnt_id:\t1\ninotify wd:1 ino:3 sdev:fe00000 mask:fff ignored_mask:0 \n",
    "36 35 98:0 / /mnt\\0402 rw shared:1 - ext3 /dev/root rw\n",
    "ID: 0\nsignal: 14/0000000000000000\nnotify: signal/pid.4390\nClockID: 1\n",
    "Limit   Soft\nMax cpu time              unlimited            unlimited            seconds   \n",
    "monotonic           0         0\nboottime            0         0\n",
    "x (1, #threads: 1)\nse.exec_start     :     823364.987418\n",
    "processor\t: 0\nflags\t\t: fpu\n",
)
garbage = st.one_of(
    st.text(max_size=300), st.text(alphabet="0123456789abcdef:- ()\n\t/\\.,rwxps", max_size=300)
)
u64 = st.integers(min_value=0, max_value=2**64 - 1)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """Return a sample with one stretch replaced."""
    sample = draw(st.sampled_from(SAMPLES))
    start = draw(st.integers(min_value=0, max_value=len(sample)))
    end = draw(st.integers(min_value=start, max_value=min(len(sample), start + 8)))
    return sample[:start] + draw(st.text(max_size=6) | st.just("9" * 5000)) + sample[end:]


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: f"{parse.__module__}.{parse.__name__}")
@given(text=garbage | damaged())
def test_garbage_is_refused_with_a_value_error_and_nothing_else(
    parse: Callable[[str], object], text: str
) -> None:
    with contextlib.suppress(ValueError):
        parse(text)


@given(raw=st.binary(max_size=200))
def test_garbage_of_bytes_is_refused_with_a_value_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        auxv.parse(raw)


@given(
    comm=st.text(alphabet=st.characters(exclude_characters="\0"), max_size=15),
    fields=st.lists(u64, min_size=49),
)
def test_no_name_shifts_the_fields_of_stat(comm: str, fields: list[int]) -> None:
    found = stat.parse(f"7 ({comm}) S {' '.join(map(str, fields))}\n")
    assert (found.comm, found.ppid, found.exit_code) == (comm, fields[0], fields[48])


@given(
    start=st.integers(min_value=0, max_value=2**63),
    pages=st.integers(min_value=1, max_value=2**40),
    perms=st.from_regex(r"[r-][w-][x-][ps]", fullmatch=True),
    offset=u64,
    inode=u64,
    name=st.text(alphabet=st.characters(exclude_characters="\0\\"), max_size=40),
)
def test_a_mapping_comes_back_as_it_was_shown(
    start: int, pages: int, perms: str, offset: int, inode: int, name: str
) -> None:
    path = f"/{name}"
    shown = path.replace("\n", "\\012")
    line = (
        f"{start:08x}-{start + pages * 4096:08x} {perms} {offset:08x} fe:0a {inode} ".ljust(73) + shown + "\n"
    )
    (found,) = maps.parse_maps(line)
    assert (found.start, found.length_bytes, found.perms) == (start, pages * 4096, perms)
    assert (found.offset, found.inode, found.path) == (offset, inode, path)


@given(raw=st.binary(max_size=60))
def test_every_path_survives_the_escapes_of_mountinfo(raw: bytes) -> None:
    shown = re.sub(rb"[ \t\n\\#]", lambda found: b"\\%03o" % found[0][0], raw)
    assert source.unescape_octal(source.decode(shown)) == source.decode(raw)


@given(name=st.text(max_size=15))
def test_every_name_survives_the_escapes_of_status(name: str) -> None:
    shown = name.replace("\\", "\\\\").replace("\n", "\\n")
    assert source.unescape_comm(shown) == name
