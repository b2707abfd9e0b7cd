"""The mappings of a process: /proc/PID/maps and smaps, proc_pid_maps(5), proc_pid_smaps(5).

smaps walks the page tables: 27 ms for each GiB of small pages, against 0.2 ms for maps. Read it
before a freeze, not inside one.
"""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from godwit.procfs import source
from godwit.types import Pid

DELETED = " (deleted)"
"""What /proc appends to the path of a file whose name is gone. A file may really be called so."""
_READS = 20
_HEADER = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
_PERMS = re.compile(r"[r-][w-][x-][ps]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """One vma. What only smaps tells is empty or 0 when it came from maps."""

    start: int
    end: int
    perms: str  # r w x p|s, each or a dash
    offset: int  # bytes into the file
    dev_major: int
    dev_minor: int
    inode: int  # 0: not of a file
    path: str  # or [heap], [stack], [vdso], [anon:name]; "" for none
    flags: frozenset[str] = frozenset()  # VmFlags, two letters each
    rss_bytes: int = 0
    anonymous_bytes: int = 0
    swap_bytes: int = 0
    locked_bytes: int = 0
    page_size_bytes: int = 0
    protection_key: int = 0

    @property
    def length_bytes(self) -> int:
        """The size of the address range."""
        return self.end - self.start

    @property
    def readable(self) -> bool:
        """Whether the program may read here."""
        return self.perms[0] == "r"

    @property
    def writable(self) -> bool:
        """Whether the program may write here."""
        return self.perms[1] == "w"

    @property
    def executable(self) -> bool:
        """Whether the program may execute here."""
        return self.perms[2] == "x"

    @property
    def shared(self) -> bool:
        """Whether it was mapped MAP_SHARED."""
        return self.perms[3] == "s"

    @property
    def deleted(self) -> bool:
        """Whether the file has lost its name. A file really named so looks the same."""
        return self.path.endswith(DELETED)


def _parse_line(line: str, file: str) -> Mapping:
    try:
        span, perms, offset, dev, inode, *rest = line.split(" ", 5)
        start, _, end = span.partition("-")
        major, _, minor = dev.partition(":")
        mapping = Mapping(
            start=int(start, 16),
            end=int(end, 16),
            perms=perms,
            offset=int(offset, 16),
            dev_major=int(major, 16),
            dev_minor=int(minor, 16),
            inode=int(inode),
            # Only a newline is escaped here. A backslash is not, so a name that holds the four
            # characters \012 cannot be told from one with a newline; map_files can.
            path=rest[0].lstrip(" ").replace("\\012", "\n") if rest else "",
        )
    except ValueError:
        raise source.malformed(file, "no mapping", line) from None
    if mapping.start >= mapping.end or not _PERMS.fullmatch(perms):
        raise source.malformed(file, "no mapping", line)
    return mapping


def parse_maps(text: str) -> tuple[Mapping, ...]:
    """Read maps, in order of address. Raises ValueError with the line that is wrong."""
    return tuple(_parse_line(line, "maps") for line in source.lines(text))


def _with_details(header: Mapping, details: dict[str, str]) -> Mapping:
    def size_bytes(key: str) -> int:
        return 1024 * source.number("smaps", key, details.get(key, "0").removesuffix("kB"))

    return replace(
        header,
        flags=frozenset(details.get("VmFlags", "").split()),
        rss_bytes=size_bytes("Rss"),
        anonymous_bytes=size_bytes("Anonymous"),
        swap_bytes=size_bytes("Swap"),
        locked_bytes=size_bytes("Locked"),
        page_size_bytes=size_bytes("KernelPageSize"),
        protection_key=source.number("smaps", "ProtectionKey", details.get("ProtectionKey", "0")),
    )


def parse_smaps(text: str) -> tuple[Mapping, ...]:
    """Read smaps, in order of address. Raises ValueError with the line that is wrong."""
    found: list[Mapping] = []
    header: Mapping | None = None
    details: dict[str, str] = {}
    for line in source.lines(text):
        if _HEADER.match(line):
            if header is not None:
                found.append(_with_details(header, details))
            header, details = _parse_line(line, "smaps"), {}
            continue
        key, colon, value = line.partition(":")
        if not colon or header is None:
            raise source.malformed("smaps", "no mapping and no detail of one", line)
        details[key] = value
    if header is not None:
        found.append(_with_details(header, details))
    return tuple(found)


def read_maps(pid: Pid, *, proc: str = source.PROC) -> tuple[Mapping, ...]:
    """Read the mappings; none for a zombie.

    Raises:
        ProcessLookupError: The process is gone.
        FileNotFoundError: It maps and unmaps faster than it can be looked at.
    """
    return _in_order(lambda: parse_maps(source.read_text(pid, "maps", proc=proc)))


def read_smaps(pid: Pid, *, proc: str = source.PROC) -> tuple[Mapping, ...]:
    """Read the mappings with their flags and sizes. Raises as `read_maps` does."""
    return _in_order(lambda: parse_smaps(source.read_text(pid, "smaps", proc=proc)))


def _in_order(read: Callable[[], tuple[Mapping, ...]]) -> tuple[Mapping, ...]:
    """Read again what cannot have been so at any moment.

    The kernel shows a long list a page at a time. When the program maps where it has unmapped in between,
    mappings overlap that never were at the same time.
    """
    for _ in range(_READS):
        found = read()
        if all(one.end <= other.start for one, other in itertools.pairwise(found)):
            return found
    raise FileNotFoundError(errno.ENOENT, "mappings change faster than they can be read")
