"""Whole programs, each moved twice in every way: away and back."""

from __future__ import annotations

import pytest

from tests.conftest import requires
from tests.journey.transfer import Transfer
from tests.workloads.driver import WORKLOADS

pytestmark = requires("root")

# Small, because each program comes four times; `test_ten_hops` moves them in full size.
SMALL = {"numpy_py": ("mib=16",), "calls_c": ("hold_ms=100",)}
HOPS = 2
CONNECTED = "redis_py"  # moves only with --tcp-close: see `test_live`


def must_be_there(name: str) -> None:
    reason = WORKLOADS[name].available()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != CONNECTED])
def test_a_program_that_was_moved_acquits(transfer: Transfer, name: str) -> None:
    must_be_there(name)
    program = transfer.start(name, SMALL.get(name, ()))
    for _ in range(HOPS):
        transfer.move(program)
    transfer.finish(program)
