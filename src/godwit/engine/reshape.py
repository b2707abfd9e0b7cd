"""How one address space becomes another with as many pages kept as can be.

Both ends of a move compute this from the same two outlines: the destination to know what to do, the
source to know which pages are lost by it and have to be sent again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from godwit.engine import ranges
from godwit.engine.ranges import Range
from godwit.resources.memory import Backing, VmaEntry
from godwit.resources.outline import OutlineEntry, SpaceEntry
from godwit.resources.process import IdentityEntry, ProcessState

Key = tuple[object, ...]
_OF_FILES: Final = (Backing.FILE, Backing.OBJECT)


@dataclass(slots=True)
class Reshape:
    """What to do, in this order; addresses are those of the space."""

    unmap: list[Range] = field(default_factory=list[Range])
    map: list[VmaEntry] = field(default_factory=list[VmaEntry])  # whole mappings, or parts of them
    protect: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    kept: list[Range] = field(default_factory=list[Range])

    @property
    def nothing(self) -> bool:
        """The spaces are the same."""
        return not self.unmap and not self.map and not self.protect


def reshape(before: OutlineEntry, old: SpaceEntry, now: OutlineEntry, new: SpaceEntry) -> Reshape:
    """Compare two descriptions of the same process's mappings."""
    found = Reshape()
    if _kernel_part(old) != _kernel_part(new):
        # vdso and vvar can only be moved when everything else is out of the way.
        found.unmap = ranges.union((vma.start, vma.end) for vma in old.vmas if not _is_kernel(vma))
        found.map = [vma for vma in new.vmas if not _is_kernel(vma)]
        return found
    old_key, new_key = _keys(before), _keys(now)
    for start, end, one, other in _pieces(old.vmas, new.vmas):
        if one is not None and other is not None and old_key(one) == new_key(other):
            found.kept.append((start, end))
            if one.protection != other.protection:
                found.protect.append((start, end, other.protection))
            continue
        if one is not None:
            found.unmap.append((start, end))
        if other is not None:
            _add_part(found.map, other, start, end)
    found.unmap = ranges.union(found.unmap)
    found.kept = ranges.union(found.kept)
    return found


def _is_kernel(vma: VmaEntry) -> bool:
    return vma.backing is Backing.KERNEL


def _kernel_part(space: SpaceEntry) -> list[tuple[bytes, int, int]]:
    return [(vma.name, vma.start, vma.end) for vma in space.vmas if _is_kernel(vma)]


def _keys(shape: OutlineEntry) -> Callable[[VmaEntry], Key]:
    """Return a function that gives what two mappings must have in common to be the same.

    Files are numbered anew in each outline; names and locks are given at the very end.
    """
    objects = {entry.object_id: (entry.kind, entry.name) for entry in shape.objects}

    def key(vma: VmaEntry) -> Key:
        return (
            vma.backing,
            vma.shared,
            vma.start - vma.offset if vma.backing in _OF_FILES else 0,
            shape.path_files[vma.file] if vma.file >= 0 else None,
            vma.object_id,
            objects.get(vma.object_id),
            vma.grows_down,
            vma.reserve,
            vma.advice,
            vma.may_write,
        )

    return key


def _pieces(
    old: Sequence[VmaEntry], new: Sequence[VmaEntry]
) -> Iterator[tuple[int, int, VmaEntry | None, VmaEntry | None]]:
    """Yield (start, end, old mapping, new mapping) of every stretch that is mapped in either."""
    before = [vma for vma in old if not _is_kernel(vma)]
    after = [vma for vma in new if not _is_kernel(vma)]
    edges = sorted({edge for vma in (*before, *after) for edge in (vma.start, vma.end)})
    one, other = 0, 0
    for start, end in itertools.pairwise(edges):
        while one < len(before) and before[one].end <= start:
            one += 1
        while other < len(after) and after[other].end <= start:
            other += 1
        had = before[one] if one < len(before) and before[one].start <= start else None
        has = after[other] if other < len(after) and after[other].start <= start else None
        if had is not None or has is not None:
            yield start, end, had, has


def _add_part(parts: list[VmaEntry], vma: VmaEntry, start: int, end: int) -> None:
    """Add a stretch of a mapping to what is to be mapped, joined to the stretch before it."""
    last = parts[-1] if parts else None
    if last is not None and last.end == start and vma.start <= last.start < vma.end:
        parts[-1] = replace(last, end=end)
        return
    offset = vma.offset + (start - vma.start) if vma.backing in _OF_FILES else vma.offset
    parts.append(replace(vma, start=start, end=end, offset=offset))


def surviving(before: OutlineEntry, now: OutlineEntry) -> dict[int, list[Range]]:
    """Return, by pid, the ranges whose pages a destination keeps from one outline to the next."""
    if not adaptable(before, now):
        return {}
    old = {space.pid: space for space in before.spaces}
    return {
        space.pid: reshape(before, old[space.pid], now, space).kept
        for space in now.spaces
        if space.pid in old
    }


def adaptable(before: OutlineEntry, now: OutlineEntry) -> bool:
    """Tell whether a tree made for one outline can become the other process by process.

    Processes may have ended or come to be, and threads too. Who stays must stand where it stood, and who is
    new must be in a session of its own or its parent's: others take a history that only a new tree repeats.
    """
    old = {identity.pid: identity for identity in before.identities}
    sessions = {identity.pid: identity.sid for identity in now.identities}
    if before.identities[0].pid != now.identities[0].pid:
        return False
    for identity in now.identities:
        known = old.get(identity.pid)
        if known is not None and not _stays(known, identity):
            return False
        own = (identity.pid, sessions.get(identity.ppid))
        if known is None and identity.sid not in own:
            return False
    return True


def _stays(known: IdentityEntry, now: IdentityEntry) -> bool:
    if known.state is ProcessState.ZOMBIE and known != now:
        return False
    standing = (known.ppid, known.pgid, known.sid, known.exit_signal)
    return standing == (now.ppid, now.pgid, now.sid, now.exit_signal)
