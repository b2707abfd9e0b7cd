from __future__ import annotations

import struct

import pytest

from godwit.errors import RequestError
from godwit.lab import idle, plan
from godwit.lab.switch import Delayer

A, B, EVERYBODY = b"\x02aaaaa", b"\x02bbbbb", b"\xff" * 6


def frame(source: bytes, target: bytes, length: int = 60) -> bytes:
    return bytes(10) + target + source + bytes(length)


def test_a_frame_is_held_until_its_time_and_no_longer() -> None:
    delayer = Delayer(ports=2, delay_ns=100)
    delayer.take(1000, 0, frame(A, B))
    assert delayer.wait_s(1040) == pytest.approx(60e-9)
    assert delayer.due(1099) == []
    assert delayer.due(1100) == [([1], frame(A, B))]
    assert delayer.wait_s(1100) is None
    assert delayer.held_bytes == 0


def test_frames_leave_in_the_order_they_came() -> None:
    delayer = Delayer(ports=2, delay_ns=100)
    sent = [frame(A, B, length) for length in (60, 61, 62)]
    for now, each in enumerate(sent):
        delayer.take(now, 0, each)
    assert [each for _, each in delayer.due(1000)] == sent


def test_a_known_machine_gets_its_frames_alone_and_an_unknown_ones_go_everywhere() -> None:
    delayer = Delayer(ports=3, delay_ns=0)
    delayer.take(0, 2, frame(B, EVERYBODY))
    delayer.take(0, 0, frame(A, B))
    delayer.take(0, 2, frame(B, A))
    delayer.take(0, 2, frame(A, B))  # both behind one port: the bridge there has delivered it
    assert [to for to, _ in delayer.due(0)] == [[0, 1], (2,), (0,)]


def test_a_full_queue_loses_frames_and_recovers() -> None:
    delayer = Delayer(ports=2, delay_ns=10)
    big = frame(A, B, 64 << 10)
    for _ in range(2000):
        delayer.take(0, 0, big)
    kept = len(delayer.due(10))
    assert 900 < kept < 1100
    delayer.take(20, 0, big)
    assert len(delayer.due(30)) == 1


def test_a_frame_too_short_to_have_a_sender_is_dropped() -> None:
    delayer = Delayer(ports=2, delay_ns=0)
    delayer.take(0, 0, bytes(15))
    assert delayer.due(0) == []


def test_rates_and_times_are_read_as_tc_writes_them() -> None:
    assert [plan.parse_rate(text) for text in ("1gbit", "2.5Gbit", "100mbit", "500kbit", "9000bit")] == [
        1_000_000_000,
        2_500_000_000,
        100_000_000,
        500_000,
        9_000,
    ]
    assert [plan.parse_time(text) for text in ("5ms", "200us", "1s", "0.5ms")] == [
        5_000_000,
        200_000,
        1_000_000_000,
        500_000,
    ]
    for text in ("", "fast", "10", "1 gbit", "-1gbit", "0gbit", "1gbps"):
        with pytest.raises(RequestError):
            plan.parse_rate(text)
    for text in ("", "5", "5 ms", "-5ms", "1h"):
        with pytest.raises(RequestError):
            plan.parse_time(text)


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_the_first_process_is_a_small_program_for_its_machine(machine: str, number: int) -> None:
    program = idle.program(machine)
    assert program[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", program, 18) == (number,)
    (entry,) = struct.unpack_from("<Q", program, 24)
    assert entry - 0x400000 < len(program) < 256


def test_a_machine_nobody_wrote_the_first_process_for_is_named() -> None:
    with pytest.raises(RequestError, match="sparc"):
        idle.program("sparc")
