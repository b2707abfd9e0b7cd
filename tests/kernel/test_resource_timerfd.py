"""Timers move with their remaining time and with the expirations nobody read yet."""

from __future__ import annotations

import os
import select
import struct
import time

import pytest

from godwit.errors import ImageError
from godwit.linux import timerfd as kernel
from godwit.resources import timerfd
from godwit.resources.base import Disposition
from godwit.resources.timerfd import TimerFdEntry
from godwit.types import FileId, OwnedFd
from tests.kernel.openfiles import Builder, held, info_of, moved, restored

HOUR_NS = 3600 * 10**9
MINUTE_NS = 60 * 10**9


def made(clock: int, *, flags: int = 0, value_ns: int, interval_ns: int = 0) -> int:
    with kernel.create(clock) as fd:
        kernel.settime(fd.number, flags=flags, value_ns=value_ns, interval_ns=interval_ns)
        return fd.release().detach()


def wait_until_expired(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(20_000)


def ticks(fd: OwnedFd) -> int:
    count: int = struct.unpack("=Q", os.read(fd.number, 8))[0]
    return count


@pytest.mark.parametrize("clock", [kernel.CLOCK_REALTIME, kernel.CLOCK_MONOTONIC, kernel.CLOCK_BOOTTIME])
@pytest.mark.parametrize("interval_ns", [0, 7 * MINUTE_NS + 3])
def test_a_relative_timer_keeps_what_remains(clock: int, interval_ns: int) -> None:
    fd = made(clock, value_ns=HOUR_NS, interval_ns=interval_ns)
    with held(fd) as child, restored(timerfd.KIND, child) as builder, child.twin(fd) as twin:
        mine = moved(child, builder, fd)
        remaining_ns, interval = kernel.gettime(mine.number)
        assert 0 <= remaining_ns - kernel.gettime(twin.number)[0] < MINUTE_NS
        assert interval == interval_ns
        for key in ("clockid", "settime flags", "ticks"):
            assert info_of(mine).fields[key] == info_of(twin).fields[key]


@pytest.mark.parametrize("clock", [kernel.CLOCK_REALTIME, kernel.CLOCK_MONOTONIC])
def test_an_absolute_timer_stays_absolute(clock: int) -> None:
    flags = kernel.TFD_TIMER_ABSTIME
    if clock == kernel.CLOCK_REALTIME:
        flags |= kernel.TFD_TIMER_CANCEL_ON_SET
    fd = made(clock, flags=flags, value_ns=time.clock_gettime_ns(clock) + HOUR_NS)
    with held(fd) as child, restored(timerfd.KIND, child) as builder, child.twin(fd) as twin:
        mine = moved(child, builder, fd)
        assert abs(kernel.gettime(mine.number)[0] - kernel.gettime(twin.number)[0]) < MINUTE_NS
        assert int(info_of(mine).fields["settime flags"], 8) == flags


def test_an_absolute_time_of_the_wall_clock_that_passed_on_the_way_expires_at_once() -> None:
    entry = TimerFdEntry(
        file_id=FileId(1),
        clock=kernel.CLOCK_REALTIME,
        flags=kernel.TFD_TIMER_ABSTIME,
        remaining_ns=HOUR_NS,
        expires_ns=time.time_ns() - HOUR_NS,
        interval_ns=0,
        ticks=0,
    )
    with timerfd.restore(entry, Builder())[FileId(1)] as fd:
        wait_until_expired(fd.number)
        assert ticks(fd) == 1


def test_an_expiration_nobody_read_is_read_after_the_move() -> None:
    fd = made(kernel.CLOCK_MONOTONIC, value_ns=1)
    wait_until_expired(fd)
    with held(fd) as child, restored(timerfd.KIND, child) as builder, child.twin(fd) as twin:
        assert ticks(moved(child, builder, fd)) == ticks(twin) == 1
        assert kernel.gettime(moved(child, builder, fd).number) == (0, 0)


def test_a_periodic_timer_loses_no_expiration() -> None:
    # It expires once at once; the hour after that shows that the move counted but did not restart it.
    fd = made(kernel.CLOCK_MONOTONIC, value_ns=1, interval_ns=HOUR_NS)
    wait_until_expired(fd)
    with held(fd) as child, restored(timerfd.KIND, child) as builder, child.twin(fd) as twin:
        mine = moved(child, builder, fd)
        assert ticks(mine) == ticks(twin) == 1
        assert 0 <= kernel.gettime(mine.number)[0] - kernel.gettime(twin.number)[0] < MINUTE_NS


def test_expirations_that_nobody_looked_at_are_counted() -> None:
    fd = made(kernel.CLOCK_MONOTONIC, value_ns=1, interval_ns=10**6)
    with kernel.create(kernel.CLOCK_MONOTONIC) as stopwatch:
        kernel.settime(stopwatch.number, flags=0, value_ns=20 * 10**6, interval_ns=0)
        wait_until_expired(stopwatch.number)
    with held(fd) as child, restored(timerfd.KIND, child) as builder, child.twin(fd) as twin:
        assert ticks(moved(child, builder, fd)) >= 20
        assert ticks(twin) >= 20


def test_a_fast_periodic_timer_counts_at_least_what_its_twin_had_counted() -> None:
    fd = made(kernel.CLOCK_MONOTONIC, value_ns=1000, interval_ns=1000)
    with held(fd) as child, child.twin(fd) as twin:
        entry = timerfd.collect(child.files, child)[0]
        assert entry.ticks > 0
        with timerfd.restore(entry, Builder())[entry.file_id] as mine:
            assert ticks(mine) >= entry.ticks
            wait_until_expired(mine.number)
        assert ticks(twin) >= entry.ticks


def test_a_disarmed_timer_stays_disarmed() -> None:
    fd = made(kernel.CLOCK_MONOTONIC, value_ns=0)
    with held(fd) as child, restored(timerfd.KIND, child) as builder:
        assert timerfd.inspect(child.at(fd), child).disposition is Disposition.MOVE
        assert kernel.gettime(moved(child, builder, fd).number) == (0, 0)


@pytest.mark.parametrize(("field", "value"), [("clock", 5), ("flags", 64), ("interval_ns", 2**63)])
def test_an_impossible_timer_from_a_peer_is_refused(field: str, value: int) -> None:
    fields = {"clock": 1, "flags": 0, "remaining_ns": 0, "expires_ns": 0, "interval_ns": 0, "ticks": 0}
    with pytest.raises(ImageError):
        timerfd.restore(TimerFdEntry(file_id=FileId(1), **(fields | {field: value})), Builder())
