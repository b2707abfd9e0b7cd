"""Of a chain of images the last is built, with the very pages of who had followed every change."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.engine import reshape
from godwit.engine.ranges import Ranges
from godwit.migrate import sifting
from godwit.migrate.sifting import Sieve
from godwit.resources.memory import Backing, VmaEntry
from godwit.resources.objects import ObjectEntry, ObjectKind
from godwit.resources.outline import OutlineEntry, SpaceEntry
from godwit.resources.process import IdentityEntry, ProcessState
from godwit.types import PAGE_SIZE, page_ceil

PAGES = 12
PIDS = (7, 8)
BASE = 16 * PAGE_SIZE

Key = tuple[str, int, int]  # a process's pid or an object's number, and a page


@dataclass
class Memory:
    """What is written where. Satisfies `Ground`."""

    shape: OutlineEntry
    content: dict[Key, int] = field(default_factory=dict)

    def write_process_pages(self, index: int, runs: Ranges, data: memoryview | None) -> None:
        self._write("process", self.shape.spaces[index].pid, runs, data)

    def drop_process_pages(self, index: int, runs: Ranges) -> None:
        self._drop("process", self.shape.spaces[index].pid, runs)

    def write_object_pages(self, object_id: int, runs: Ranges, data: memoryview | None) -> None:
        self._write("object", object_id, runs, data)

    def drop_object_pages(self, object_id: int, runs: Ranges) -> None:
        self._drop("object", object_id, runs)

    def leave(self, index: int, runs: Ranges) -> None:
        raise AssertionError(f"pages left behind: {index} {runs}")

    def _write(self, what: str, owner: int, runs: Ranges, data: memoryview | None) -> None:
        at = 0
        for start, end in runs:
            for page in range(start, end, PAGE_SIZE):
                self.content[what, owner, page] = 0 if data is None else data[at]
                at += PAGE_SIZE

    def _drop(self, what: str, owner: int, runs: Ranges) -> None:
        for start, end in runs:
            for page in range(start, end, PAGE_SIZE):
                self.content.pop((what, owner, page), None)

    def follow(self, now: OutlineEntry) -> None:
        """Change as a destination does that is told of another shape."""
        adaptable = reshape.adaptable(self.shape, now)
        kept = reshape.surviving(self.shape, now)
        sizes = {(each.object_id, each.name): each.size_bytes for each in now.objects}
        names = {each.object_id: each.name for each in self.shape.objects}

        def lasts(key: Key) -> bool:
            what, owner, page = key
            if what == "process":
                return any(start <= page < end for start, end in kept.get(owner, []))
            return adaptable and page < sizes.get((owner, names[owner]), 0)

        self.content = {key: value for key, value in self.content.items() if lasts(key)}
        self.shape = now


def identity(pid: int, tids: int) -> IdentityEntry:
    return IdentityEntry(
        pid=pid,
        ppid=0,
        pgid=pid,
        sid=pid,
        exit_signal=17,
        state=ProcessState.RUNNING,
        wait_status=0,
        comm=b"p",
        tids=(pid, *range(100, 100 + tids)),
    )


@st.composite
def vmas(draw: st.DrawFn) -> tuple[VmaEntry, ...]:
    edges = sorted(draw(st.sets(st.integers(0, PAGES), min_size=2, max_size=6)))
    found = []
    for first, beyond in itertools.pairwise(edges):
        if draw(st.booleans()):
            continue
        found.append(
            VmaEntry(
                start=BASE + first * PAGE_SIZE,
                end=BASE + beyond * PAGE_SIZE,
                protection=draw(st.sampled_from((1, 3))),
                shared=False,
                may_write=True,
                backing=Backing.ANONYMOUS,
                file=-1,
                object_id=0,
                offset=0,
                name=b"",
                grows_down=False,
                reserve=draw(st.booleans()),
                advice=(),
            )
        )
    return tuple(found)


@st.composite
def objects(draw: st.DrawFn) -> tuple[ObjectEntry, ...]:
    return tuple(
        ObjectEntry(
            object_id=number,
            kind=ObjectKind.MEMFD,
            name=draw(st.sampled_from((b"a", b"a", b"a", b"b"))),
            size_bytes=draw(st.integers(1, 3 * PAGE_SIZE)),
            mode=0o600,
            uid=0,
            gid=0,
        )
        for number in draw(st.sampled_from(((1, 2), (1, 2), (1,), ())))
    )


@st.composite
def shapes(draw: st.DrawFn) -> OutlineEntry:
    pids = draw(st.sampled_from((PIDS, PIDS, PIDS[:1])))
    return OutlineEntry(
        identities=tuple(identity(pid, draw(st.integers(0, 2))) for pid in pids),
        spaces=tuple(SpaceEntry(pid=pid, vmas=draw(vmas()), vdso_digest=b"") for pid in pids),
        path_files=(),
        objects=draw(objects()),
    )


@st.composite
def stories(draw: st.DrawFn) -> list[OutlineEntry]:
    """Draw what a tree is like one time after the other: mostly little changes at once."""
    found = [draw(shapes())]
    for _ in range(draw(st.integers(0, 3))):
        last, other = found[-1], draw(shapes())
        if draw(st.booleans()):
            other = replace(other, identities=last.identities, spaces=last.spaces)
        if draw(st.booleans()):
            other = replace(other, objects=last.objects)
        found.append(other)
    return found


Write = tuple[str, int, list[tuple[int, int]], int]  # what, which, runs, content; -1: dropped


@st.composite
def writes(draw: st.DrawFn, shape: OutlineEntry) -> list[Write]:
    """Draw frames that are honest for a shape."""
    places: list[tuple[str, int, list[tuple[int, int]]]] = []
    for index, each in enumerate(shape.spaces):
        places.append(("process", index, [(vma.start, vma.end) for vma in each.vmas]))
    places += [("object", entry.object_id, [(0, page_ceil(entry.size_bytes))]) for entry in shape.objects]
    found: list[Write] = []
    for what, which, spans in places:
        pages = [page for start, end in spans for page in range(start, end, PAGE_SIZE)]
        if not pages:
            continue
        for _ in range(draw(st.integers(0, 2))):
            chosen = sorted(draw(st.sets(st.sampled_from(pages), min_size=1)))
            runs = [(page, page + PAGE_SIZE) for page in chosen]
            found.append((what, which, runs, draw(st.integers(-1, 255))))
    return found


def play(ground: Sieve | Memory, frames: Sequence[Write]) -> None:
    for what, which, runs, content in frames:
        # Each page its own content, so that none can be taken for its neighbour.
        data = memoryview(b"".join(bytes([(content + at) % 256]) * PAGE_SIZE for at in range(len(runs))))
        if what == "process":
            if content < 0:
                ground.drop_process_pages(which, runs)
            else:
                ground.write_process_pages(which, runs, data if content else None)
        elif content < 0:
            ground.drop_object_pages(which, runs)
        else:
            ground.write_object_pages(which, runs, data if content else None)


@settings(max_examples=500)
@given(st.data())
def test_the_last_image_has_the_pages_of_who_followed_every_change(data: st.DataObject) -> None:
    story = data.draw(stories())
    frames = [data.draw(writes(shape)) for shape in story]
    following = Memory(story[0])
    for shape, part in zip(story, frames, strict=True):
        following.follow(shape)
        play(following, part)
    built = Memory(story[-1])
    for stage, part in zip(sifting.stages(story), frames, strict=True):
        play(Sieve(built, stage, story[-1]), part)
    assert built.content == following.content
