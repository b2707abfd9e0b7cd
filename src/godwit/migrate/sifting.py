"""Which pages of a chain of images reach its end.

On the way the tree has had other mappings, and other processes, than at the end. None of them is made
again: files they mapped may be gone by now. Only the last is built, and of what came for an earlier one
there is kept what a destination that follows every change would still have: see `engine/reshape.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from godwit.engine import ranges, reshape, space
from godwit.engine.ranges import Range, Ranges
from godwit.errors import ImageError
from godwit.migrate.filling import Ground
from godwit.resources.outline import OutlineEntry
from godwit.types import page_ceil

_EVERYTHING = [(0, 1 << 64)]


@dataclass(frozen=True, slots=True)
class Stage:
    """What the tree was like for some of the frames."""

    shape: OutlineEntry
    lasting: dict[int, list[Range]] = field(default_factory=dict[int, list[Range]])
    """By pid: where its pages are still there at the end."""
    objects: dict[int, int] = field(default_factory=dict[int, int])
    """By object id: up to where its pages are."""


def stages(shapes: Sequence[OutlineEntry]) -> list[Stage]:
    """Return a stage for each outline of a chain, in order."""
    last = shapes[-1]
    after = Stage(
        last,
        {each.pid: _EVERYTHING for each in last.spaces},
        {entry.object_id: page_ceil(entry.size_bytes) for entry in last.objects},
    )
    found = [after]
    for now, before in itertools.pairwise(reversed(shapes)):
        after = _before(before, now, after)
        found.append(after)
    found.reverse()
    return found


def _before(before: OutlineEntry, now: OutlineEntry, after: Stage) -> Stage:
    if not reshape.adaptable(before, now):
        return Stage(before)
    kept = reshape.surviving(before, now)
    lasting = {
        pid: ranges.intersect(kept.get(pid, []), later) for pid, later in after.lasting.items() if pid in kept
    }
    same = {(entry.object_id, entry.kind, entry.name) for entry in now.objects}
    objects = {
        entry.object_id: min(page_ceil(entry.size_bytes), after.objects[entry.object_id])
        for entry in before.objects
        if (entry.object_id, entry.kind, entry.name) in same and entry.object_id in after.objects
    }
    return Stage(before, lasting, objects)


class Sieve:
    """Takes frames that were meant for one stage, and passes on what lasts. Satisfies `Ground`."""

    def __init__(self, ground: Ground, stage: Stage, last: OutlineEntry) -> None:
        self._ground = ground
        self._stage = stage
        self._index = {each.pid: index for index, each in enumerate(last.spaces)}

    def write_process_pages(self, index: int, runs: Ranges, data: memoryview | None) -> None:
        """Write pages of a process, zeroes without data."""
        pid = self._checked(index, runs)
        for kept, part in _kept(runs, data, self._stage.lasting.get(pid, [])):
            self._ground.write_process_pages(self._index[pid], kept, part)

    def drop_process_pages(self, index: int, runs: Ranges) -> None:
        """Give up pages of a process."""
        pid = self._checked(index, runs)
        kept = ranges.intersect(runs, self._stage.lasting.get(pid, []))
        if kept:
            self._ground.drop_process_pages(self._index[pid], kept)

    def write_object_pages(self, object_id: int, runs: Ranges, data: memoryview | None) -> None:
        """Write pages of a memory object, zeroes without data."""
        for kept, part in _kept(runs, data, self._lasting_of(object_id, runs)):
            self._ground.write_object_pages(object_id, kept, part)

    def drop_object_pages(self, object_id: int, runs: Ranges) -> None:
        """Punch holes into a memory object."""
        kept = ranges.intersect(runs, self._lasting_of(object_id, runs))
        if kept:
            self._ground.drop_object_pages(object_id, kept)

    def leave(self, index: int, runs: Ranges) -> None:
        """Refuse: of an image nothing comes later."""
        raise ImageError(f"pages of process {index} are left behind, which no image may: {len(runs)} runs")

    def _checked(self, index: int, runs: Ranges) -> int:
        """See that runs lie in a process of this stage; return its pid."""
        spaces = self._stage.shape.spaces
        if not 0 <= index < len(spaces):
            raise ImageError(f"pages for process {index}, of which there are {len(spaces)}")
        space.check_runs(spaces[index].vmas, runs)
        return spaces[index].pid

    def _lasting_of(self, object_id: int, runs: Ranges) -> list[Range]:
        """See that runs lie in an object of this stage; return where its pages last."""
        entry = next((each for each in self._stage.shape.objects if each.object_id == object_id), None)
        if entry is None:
            raise ImageError(f"pages for memory object {object_id}, which the image lacks")
        if any(not 0 <= start < entry.size_bytes for start, _ in runs):
            raise ImageError(f"a page lies beyond the end of memory object {object_id}")
        return [(0, self._stage.objects.get(object_id, 0))]


def _kept(
    runs: Ranges, data: memoryview | None, lasting: Ranges
) -> list[tuple[list[Range], memoryview | None]]:
    """Return the parts of runs that last, with their pages."""
    kept = ranges.intersect(runs, lasting)
    if not kept or data is None or ranges.total(kept) == ranges.total(runs):
        return [(kept, data)] if kept else []
    found: list[tuple[list[Range], memoryview | None]] = []
    at = 0
    for run in runs:
        for start, end in ranges.intersect([run], lasting):
            first = at + start - run[0]
            found.append(([(start, end)], data[first : first + end - start]))
        at += run[1] - run[0]
    return found
