"""What a deputy costs: `python -m bench.deputy`."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator

from godwit.engine import freeze
from godwit.procfs import status
from godwit.residual import deputy
from godwit.residual.deputy import Deputy
from godwit.residual.signals import Event, Keeper, Signal
from godwit.types import Pid

RUNS = 5
SIGNALS = 500
CALLS = 500
MANY = 20


@contextlib.contextmanager
def child(threads: int = 1, memory_bytes: int = 0) -> Iterator[Pid]:
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        block = mmap.mmap(-1, memory_bytes, flags=mmap.MAP_PRIVATE) if memory_bytes else b""
        for at in range(0, memory_bytes, mmap.PAGESIZE):
            block[at] = 1  # type: ignore[index]
        for _ in range(threads - 1):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        os.write(told, b"x")
        while True:
            signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    try:
        yield Pid(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def turn(pid: Pid) -> tuple[Deputy, float]:
    """Return the deputy, and how many ms it took from the parked process on."""
    tree = freeze.freeze(pid)
    tree.park()
    started_ns = time.monotonic_ns()
    known = deputy.become(list(tree.tracees[pid].values()), deputy.new_cookie())
    return known, (time.monotonic_ns() - started_ns) / 1e6


def turning() -> None:
    for name, threads, memory_bytes in (("1 thread", 1, 0), ("20 threads", 20, 0), ("1 GiB", 1, 1 << 30)):
        took = []
        rss = 0
        for _ in range(RUNS):
            with child(threads, memory_bytes) as pid:
                took.append(turn(pid)[1])
                rss = status.read(pid).vm_rss_bytes
        print(f"turning, {name}: {statistics.median(took):.2f} ms (max {max(took):.2f}); RSS {rss >> 10} KiB")


def show(name: str, took_us: list[float]) -> None:
    took_us.sort()
    print(f"{name}: median {statistics.median(took_us):.0f} us, p99 {took_us[len(took_us) * 99 // 100]:.0f}")


def timed(times: int, work: Callable[[], object]) -> list[float]:
    took = []
    for _ in range(times):
        started_ns = time.monotonic_ns()
        work()
        took.append((time.monotonic_ns() - started_ns) / 1e3)
    return took


def keeping() -> None:
    heard = threading.Event()
    arrived: list[int] = []

    def tell(_: Pid, event: Event) -> None:
        if isinstance(event, Signal):
            arrived.append(time.monotonic_ns())
            heard.set()

    keeper = Keeper(tell)
    with contextlib.ExitStack() as stack:
        known = [turn(stack.enter_context(child()))[0] for _ in range(MANY)]
        serving = threading.Thread(target=keeper.run)
        serving.start()
        before = status.read(Pid(os.getpid())).vm_rss_bytes
        for each in known:
            keeper.adopt(each).result()
        grown = status.read(Pid(os.getpid())).vm_rss_bytes - before
        print(f"keeper, each deputy: {grown / MANY / 1024:.1f} KiB, 1 descriptor")
        pid, took = known[0].pid, []
        for number in range(1, SIGNALS + 1):
            heard.clear()
            sent_ns = time.monotonic_ns()
            os.kill(pid, signal.SIGUSR1)
            heard.wait()
            took.append((arrived[-1] - sent_ns) / 1e3)
            keeper.confirm(pid, number).result()
        show("signal, kill(2) to the keeper", took)
        show(
            "call in a deputy, asked by another thread",
            timed(CALLS, lambda: keeper.call(pid, "getpid").result()),
        )
        keeper.stop_running().result()
        serving.join()
        keeper.close()


if __name__ == "__main__":
    turning()
    keeping()
