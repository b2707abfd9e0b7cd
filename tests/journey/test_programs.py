"""Whole programs, each moved twice in every way: away and back."""

from __future__ import annotations

import pytest

from tests.conftest import requires
from tests.journey.transfer import Flown, Transfer
from tests.workloads.driver import WORKLOADS

pytestmark = requires("root")

# Small, because each program comes four times; `test_ten_hops` moves them in full size.
SMALL = {"numpy_py": ("mib=16",), "calls_c": ("hold_ms=100",)}
HOPS = 2
# As people start it, it maps a file of /tmp, which is each node's own.
NOT_SHARED = "java_default"


def must_be_there(name: str) -> None:
    reason = WORKLOADS[name].available()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_program_that_was_moved_acquits(transfer: Transfer, name: str) -> None:
    must_be_there(name)
    if name == NOT_SHARED and isinstance(transfer, Flown):
        expect_a_refusal(transfer, name)
        return
    program = transfer.start(name, SMALL.get(name, ()))
    for _ in range(HOPS):
        transfer.move(program)
    transfer.finish(program)


def expect_a_refusal(flight: Flown, name: str) -> None:
    """What cannot be carried is refused by name, and goes on where it is."""
    program = flight.start(name)
    with pytest.raises(AssertionError, match=r"exit status 3: .*hsperfdata"):
        flight.move(program)
    program.running.wait_alive()
    flight.finish(program)
