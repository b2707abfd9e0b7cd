"""A memory object sent in rounds arrives as it is at the end, whatever is done to it meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.engine.sums import BLOCK_BYTES, Sums, groups
from godwit.resources import objects
from godwit.types import PAGE_SIZE, OwnedFd

LIMIT_BYTES = 3 * BLOCK_BYTES
SIZES = st.one_of(
    st.integers(0, LIMIT_BYTES), st.integers(0, 300), st.integers(PAGE_SIZE - 20, PAGE_SIZE + 20)
)


@dataclass
class Object:
    """A memory object of a program, and what it does to it."""

    fd: OwnedFd
    number: int = 0

    def act(self, action: tuple[str, int, int]) -> None:
        what, start, length = action
        self.number += 1
        if what == "write":
            os.pwrite(self.fd.number, bytes([self.number % 255 + 1]) * length, start)
        elif what == "append":
            os.pwrite(self.fd.number, b"%d\n" % self.number, self.size())
        elif what == "truncate":
            os.ftruncate(self.fd.number, start)
        elif what == "rewrite":
            # As a log that is begun anew with the same words.
            os.ftruncate(self.fd.number, 0)
            os.pwrite(self.fd.number, b"the same words\n" * (length // 15), 0)
        elif length:
            objects.punch_hole(self.fd.number, start, length)

    def size(self) -> int:
        return os.fstat(self.fd.number).st_size

    def content(self) -> bytes:
        return os.pread(self.fd.number, self.size(), 0)


@dataclass
class There:
    """The object at a destination, which cuts off what lies beyond the size it has been told."""

    known: Sums = field(default_factory=Sums)
    data: bytearray = field(default_factory=bytearray)
    told: bool = False

    def resize(self, size: int) -> None:
        if self.told:
            self.known.resize(len(self.data), size)
        self.told = True
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def round(self, source: Object, meanwhile: Iterator[tuple[str, int, int]]) -> None:
        buffer = memoryview(bytearray(LIMIT_BYTES * 2))
        changes = self.known.scan(source.fd.number, len(self.data), buffer)
        for start, end in changes.gone:
            self.put(start, bytes(end - start))
        for runs in groups(changes.dirty, BLOCK_BYTES * 2):
            for action in meanwhile:
                source.act(action)
                break
            length = self.known.read(source.fd.number, runs, buffer)
            assert length == sum(end - start for start, end in runs)
            at = 0
            for start, end in runs:
                self.put(start, bytes(buffer[at : at + end - start]))
                at += end - start

    def put(self, start: int, data: bytes) -> None:
        end = min(start + len(data), len(self.data))
        if start < end:
            self.data[start:end] = data[: end - start]


ACTIONS = st.tuples(
    st.sampled_from(("write", "append", "append", "truncate", "rewrite", "punch")),
    SIZES,
    st.integers(0, 2 * PAGE_SIZE),
)
Action = tuple[str, int, int]
Round = list[Action]  # and what happens while it goes on
STEPS: st.SearchStrategy[Action | Round | None] = st.one_of(
    ACTIONS, st.none(), st.lists(ACTIONS, max_size=3)
)  # None: the destination is told of the size


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_what_arrives_is_what_was_there_when_it_stood_still(steps: list[Action | Round | None]) -> None:
    with OwnedFd(os.memfd_create("object")) as fd:
        source, there = Object(fd), There()
        there.resize(source.size())
        for step in steps:
            if step is None:
                there.resize(source.size())
            elif isinstance(step, list):
                there.round(source, iter(step))
            else:
                source.act(step)
        there.resize(source.size())
        there.round(source, iter(()))
        assert bytes(there.data) == source.content()
