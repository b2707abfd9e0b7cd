"""What is given up before a freeze, so that the freeze has few runs to deal with."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from godwit.engine import ranges
from godwit.migrate import leaving
from godwit.types import PAGE_SIZE

GIB_PAGES = 1 << 18
MOST_RUNS = 500


@given(pages=st.integers(0, 20_000), span=st.integers(20_000, 4 * GIB_PAGES), seed=st.integers(0, 1 << 32))
def test_few_runs_are_left_for_the_freeze(pages: int, span: int, seed: int) -> None:
    chosen = random.Random(seed).sample(range(span), pages)
    written = ranges.union((page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in chosen)
    given_up = leaving.dense(written)
    assert given_up == ranges.union(given_up)
    assert len(ranges.subtract(written, given_up)) <= MOST_RUNS
    # Nothing before the first written page or after the last is touched.
    assert ranges.subtract(given_up, [(written[0][0], written[-1][1])] if written else []) == []


@given(pages=st.integers(0, MOST_RUNS))
def test_a_few_scattered_pages_are_not_worth_what_lies_between(pages: int) -> None:
    written = [(page << 21, (page << 21) + PAGE_SIZE) for page in range(pages)]
    assert leaving.dense(written) == []
