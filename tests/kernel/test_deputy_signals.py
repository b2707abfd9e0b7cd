"""No signal to a deputy is lost, doubled or overtaken, whoever dies meanwhile."""

from __future__ import annotations

import os
import random
import signal
import struct
from collections.abc import Callable

import pytest

from godwit.engine import freeze
from godwit.linux import abi, ptrace
from godwit.procfs import status
from godwit.residual import deputy
from godwit.residual.deputy import Deputy
from godwit.types import Pid, Tid
from tests.conftest import requires
from tests.kernel.deputies import Keeping, Told, program, state, turned, until
from tests.kernel.test_deputy import SLEEPS

pytestmark = requires("root")

_SI_QUEUE = -1
STORM = 10_000
SENDER_UID = 12345


def queue(pid: int, number: int, value: int, *, tid: int | None = None) -> None:
    """Queue a signal with a payload, as sigqueue(3) does; wait while the receiver's queue is full."""
    info = struct.pack("<iii4xiiQ", number, 0, _SI_QUEUE, os.getpid(), os.getuid(), value).ljust(128, b"\0")

    def sent() -> bool:
        try:
            if tid is None:
                abi.syscall("rt_sigqueueinfo", pid, number, info)
            else:
                abi.syscall("rt_tgsigqueueinfo", pid, tid, number, info)
        except BlockingIOError:
            return False
        return True

    until(sent, "room for a signal", 60)


def payload(told: Told) -> tuple[int, int, int, int]:
    """Return signal, payload, sender and its uid."""
    info = bytes.fromhex(told["info"])
    number, _, code, sender, uid, value = struct.unpack_from("<iii4xiiQ", info)
    assert code == _SI_QUEUE
    return number, value, sender, uid


def sending(work: Callable[[], None]) -> int:
    """Do something in a process of its own; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def storm_at(pid: int) -> Callable[[], None]:
    def work() -> None:
        # A receiver of root's may be signalled by root only: the uid in siginfo is the real one.
        os.setresuid(SENDER_UID, 0, 0)
        for value in range(STORM):
            queue(pid, 34 + value % 3, value)

    return work


def check_storm(heard: list[Told], sender: int) -> None:
    """See that each kind came complete and in order, with numbers that skip nothing."""
    assert [told["number"] for told in heard] == list(range(1, STORM + 1))
    for kind in range(3):
        want = [(34 + kind, value, sender, SENDER_UID) for value in range(kind, STORM, 3)]
        assert [each for each in map(payload, heard) if each[0] == 34 + kind] == want


def test_ten_thousand_signals_come_in_order() -> None:
    with program(SLEEPS) as child, Keeping() as keeper:
        keeper.adopt(turned(child.pid)[child.pid])
        sender = sending(storm_at(child.pid))
        keeper.hear_until(lambda: len(keeper.events) == STORM, "all of them")
        assert os.waitpid(sender, 0)[1] == 0
        check_storm(keeper.events, sender)


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_survives_the_death_of_its_keepers(seed: int) -> None:
    chance = random.Random(seed)
    heard: list[Told] = []
    deaths = 0

    def take(keeper: Keeping) -> int:
        told, keeper.events = keeper.events, []
        for each in told:
            if each["number"] == len(heard) + 1:
                heard.append(each)
            assert each["number"] <= len(heard), "one was lost"
        return len(told)

    with program(SLEEPS) as child:
        known = turned(child.pid)[child.pid]
        sender = sending(storm_at(child.pid))
        while len(heard) < STORM:
            # Some confirm nothing: the socket is full then, and the deputy waits.
            with Keeping(confirms=chance.random() < 0.8) as keeper:
                stays_for = chance.randrange(1, 800) if deaths < 15 else STORM
                keeper.adopt(known)
                stays_for -= take(keeper)
                while stays_for > 0 and len(heard) < STORM and keeper.hear(10 if keeper.confirms else 0.3):
                    stays_for -= take(keeper)
            deaths += 1
        assert os.waitpid(sender, 0)[1] == 0
        assert deaths > 10
        check_storm(heard, sender)


def test_signals_gather_while_no_keeper_is_there() -> None:
    numbers = [n for n in range(1, 65) if n not in (9, 19, 32, 33)]
    with program(SLEEPS) as child:
        known = turned(child.pid)[child.pid]
        for number in numbers:
            os.kill(child.pid, number)
            until(lambda: not status.read(child.pid).shd_pnd, "it is taken")
        for _ in range(3):
            with Keeping(confirms=False) as keeper:
                keeper.adopt(known)
                assert [keeper.next("Signal")["signo"] for _ in numbers] == numbers
        assert state(child.pid) == "S"


BLOCKED = """
import os, signal, sys, threading
signal.signal(signal.SIGURG, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
tid = []
def other():
    tid.append(threading.get_native_id()); told.set(); threading.Event().wait()
told = threading.Event()
threading.Thread(target=other, daemon=True).start()
told.wait()
print(*tid, flush=True)
threading.Event().wait()
"""


def test_what_went_along_is_dropped_and_what_came_late_stays() -> None:
    with program(BLOCKED) as child, Keeping() as keeper:
        other = int(child.first)

        def work() -> list[Deputy]:
            tree = freeze.freeze(child.pid)
            queue(child.pid, 40, 1)
            queue(child.pid, 40, 2)
            queue(child.pid, 40, 2)
            queue(child.pid, 41, 3, tid=other)
            os.kill(child.pid, signal.SIGURG)
            carried = [
                *ptrace.peek_signals(Tid(child.pid), shared=True),
                *ptrace.peek_signals(Tid(other), shared=False),
            ]
            # Captured; and now the latecomers.
            queue(child.pid, 40, 2)
            queue(child.pid, 40, 4)
            queue(child.pid, 41, 5, tid=other)
            queue(child.pid, 42, 6)
            os.kill(child.pid, signal.SIGCHLD)
            tree.park()
            threads = list(tree.tracees[child.pid].values())
            return [deputy.become(threads, deputy.new_cookie(), carried=carried)]

        keeper.adopt(turned(child.pid, work)[child.pid])
        os.kill(child.pid, signal.SIGTERM)
        # By number, but for the last, which came later.
        told = keeper.hear_until(
            lambda: keeper.events if keeper.events and keeper.events[-1]["signo"] == 15 else None, "SIGTERM"
        )
        assert [each["signo"] for each in told] == [signal.SIGCHLD, 40, 40, 41, 42, signal.SIGTERM]
        assert [payload(each)[1] for each in told[1:5]] == [2, 4, 5, 6]


ALARMED = "import signal; signal.setitimer(signal.ITIMER_REAL, 0.2, 0.01)\nsignal.pthread_sigmask(0, {14})\n"


def test_timers_of_the_program_do_not_go_on_at_home() -> None:
    with program(ALARMED + SLEEPS) as child, Keeping() as keeper:
        until(lambda: status.read(Pid(child.pid)).shd_pnd, "an alarm")
        keeper.adopt(turned(child.pid)[child.pid])
        assert not keeper.hear(0.1)


def test_a_keeper_may_die_in_the_middle_of_anything() -> None:
    chance = random.Random(0)
    with program(SLEEPS) as child:
        known = turned(child.pid)[child.pid]
        for turn in range(40):
            with Keeping() as keeper:
                keeper.adopt(known)
                for _ in range(chance.randrange(1, 60)):
                    keeper.say("call", child.pid, "getppid")
                    if not chance.randrange(10):
                        keeper.say("stop", child.pid, chance.choice((19, 20)))
                        keeper.say("cont", child.pid)
                # A part of it has been done, whatever that is.
                keeper.hear(chance.random() / 200)
            with Keeping() as keeper:
                keeper.adopt(known)
                # Left stopped or about to be, as job control has it; SIGCONT ends both.
                os.kill(child.pid, signal.SIGCONT)
                queue(child.pid, 40, turn)
                while True:
                    told = keeper.next("Signal", child.pid)
                    assert told["signo"] in (18, 20, 40)
                    if told["signo"] == 40:
                        break
                assert payload(told)[1] == turn
                assert keeper.call(child.pid, "getppid") == (os.getpid(), [])
