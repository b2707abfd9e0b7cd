"""What running processes lack, against a plain map of pages; and what a successor reads from the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from godwit.engine.ranges import RangeSet
from godwit.migrate import pending
from godwit.migrate.pending import Pending, Space
from godwit.types import PAGE_SIZE

MIGRATION = "0" * 32
PLACE = st.integers(0, 40)
LENGTH = st.integers(1, 8)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("gone"), st.integers(0, 5), PLACE, LENGTH, PLACE),
        st.tuples(st.just("moved"), st.integers(0, 5), PLACE, LENGTH, PLACE),
        st.tuples(st.just("forked"), st.integers(0, 5), PLACE, LENGTH, PLACE),
        st.tuples(st.just("dead"), st.integers(0, 5), PLACE, LENGTH, PLACE),
    ),
    max_size=12,
)
Model = dict[int, dict[int, int]]
"""By space: where each page that is lacked is now, to where it is at the source."""


@contextmanager
def state_directory() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as name:
        place = mock.patch.object(pending, "path_of", lambda migration: Path(name) / migration)
        with place:
            yield


def model_of(known: Pending) -> Model:
    found: Model = {}
    for number, space in known.spaces.items():
        found[number] = {}
        for shift, parts in space.pending.items():
            for start, end in parts:
                for at in range(start, end, PAGE_SIZE):
                    assert at not in found[number]
                    found[number][at] = at - shift
    return found


def apply(known: Pending, model: Model, change: tuple[str, int, int, int, int]) -> None:
    kind, number, place, length, to = change
    space = known.spaces[number % len(known.spaces)]
    lacked = model[space.number]
    start, end = place * PAGE_SIZE, (place + length) * PAGE_SIZE
    if kind == "gone":
        known.gone(space, start, end)
        for at in range(start, end, PAGE_SIZE):
            lacked.pop(at, None)
    elif kind == "moved" and abs(to - place) >= length:
        known.moved(space, start, to * PAGE_SIZE, end - start)
        taken = [lacked.pop(at, None) for at in range(start, end, PAGE_SIZE)]
        for index, source in enumerate(taken):
            lacked.pop((to + index) * PAGE_SIZE, None)
            if source is not None:
                lacked[(to + index) * PAGE_SIZE] = source
    elif kind == "forked":
        model[known.forked(space, 9).number] = dict(lacked)
    elif kind == "dead":
        known.dead(space)


@given(st.lists(st.tuples(PLACE, LENGTH), max_size=6), CHANGES)
def test_what_is_lacked_follows_every_change_and_survives_its_keeper(
    left: list[tuple[int, int]], changes: list[tuple[str, int, int, int, int]]
) -> None:
    with state_directory():
        known = Pending.create(MIGRATION)
        space = known.add(source=3, kept_at=8)
        model: Model = {0: {}}
        for place, length in left:
            known.leave(space, place * PAGE_SIZE, (place + length) * PAGE_SIZE)
            model[0] |= {at * PAGE_SIZE: at * PAGE_SIZE for at in range(place, place + length)}
        for change in changes:
            apply(known, model, change)
            assert model_of(known) == model
        for number, lacked in model.items():
            answers = {at: known.spaces[number].source_of(at) for at in range(0, 50 * PAGE_SIZE, PAGE_SIZE)}
            assert {at: source for at, source in answers.items() if source is not None} == lacked
        dead = {number for number, each in known.spaces.items() if each.dead}
        known.close()
        heir = Pending.take_over(MIGRATION)
        assert model_of(heir) == model
        assert {number for number, each in heir.spaces.items() if each.dead} == dead
        assert {each.source for each in heir.spaces.values()} == {3}
        assert heir.epoch == 2
        heir.close()


@given(st.lists(st.tuples(PLACE, LENGTH), min_size=1, max_size=4), CHANGES, PLACE, LENGTH)
def test_whoever_wants_a_page_is_found(
    left: list[tuple[int, int]], changes: list[tuple[str, int, int, int, int]], place: int, length: int
) -> None:
    with state_directory():
        known = Pending.create(MIGRATION)
        space = known.add(source=3, kept_at=8)
        model: Model = {0: {}}
        for at, count in left:
            known.leave(space, at * PAGE_SIZE, (at + count) * PAGE_SIZE)
            model[0] |= {page * PAGE_SIZE: page * PAGE_SIZE for page in range(at, at + count)}
        for change in changes:
            apply(known, model, change)
        start, end = place * PAGE_SIZE, (place + length) * PAGE_SIZE
        served: set[tuple[int, int]] = set()
        while (found := known.wanting(3, start, end)) is not None:
            wanting, shift, first, beyond = found
            for at in range(first, beyond, PAGE_SIZE):
                assert model[wanting.number][at] == at - shift
                served.add((wanting.number, at))
            known.gone(wanting, first, beyond)
        assert known.wanting(4, start, end) is None
        assert served == {
            (number, at)
            for number, lacked in model.items()
            for at, source in lacked.items()
            if start <= source < end and not known.spaces[number].dead
        }
        known.close()


def test_a_space_says_whether_it_lacks_anything() -> None:
    space = Space(0, 0, 0, {0: RangeSet()})
    assert not space.lacks()
    space.pending[0].add(0, PAGE_SIZE)
    assert space.lacks()
    space.dead = True
    assert not space.lacks()
