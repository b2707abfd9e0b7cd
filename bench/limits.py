"""What the machine itself can do: the yardstick, measured in the same run as what it is held to."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from bench import quiet
from bench.numbers import GIB, MIB
from bench.place import ROOT, Place
from godwit.linux import mem
from godwit.types import Pid, RemoteAddr

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def warm(length_bytes: int) -> None:
    """Touch and free memory: a virtual machine gets it from its host at the first use only."""
    # All of it at once: what was freed just now would be given out again.
    touch_ms(min(length_bytes, available_bytes() * 3 // 4))


def available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def touch_ms(length_bytes: int = GIB) -> float:
    """Return how long it takes to fill so much fresh memory once."""
    quiet.wait()
    with mmap.mmap(-1, length_bytes, flags=_PRIVATE) as fresh:
        place = ctypes.c_char.from_buffer(fresh)
        started_ns = time.monotonic_ns()
        ctypes.memset(ctypes.addressof(place), 1, length_bytes)
        took_ms = (time.monotonic_ns() - started_ns) / 1e6
        del place
    return took_ms


def read_foreign_ms(length_bytes: int = GIB) -> float:
    """Return how long it takes to read another process's memory, a MiB at a time."""
    with mmap.mmap(-1, length_bytes, flags=_PRIVATE) as memory:
        place = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(place)
        ctypes.memset(start, 1, length_bytes)
        ready_read, ready_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            # The parent kills us; should it die, the pipe ends.
            os.close(ready_write)
            os.read(ready_read, 1)
            os._exit(0)
        os.close(ready_read)
        try:
            took_ms = _read_all(Pid(pid), start, length_bytes)
        finally:
            os.close(ready_write)
            os.waitpid(pid, 0)
        del place
    return took_ms


def _read_all(pid: Pid, start: int, length_bytes: int) -> float:
    buffer = memoryview(bytearray(b"\x5a" * MIB))
    quiet.wait()
    started_ns = time.monotonic_ns()
    for at in range(start, start + length_bytes, MIB):
        mem.read_runs(pid, [(RemoteAddr(at), MIB)], buffer)
    return (time.monotonic_ns() - started_ns) / 1e6


def send_ms(place: Place, security: str, length_bytes: int = GIB) -> float:
    """Return how long it takes to send so much from one node to the other, `plain` or by mutual `tls`."""
    with place.serving("b", "sink", security, length_bytes) as port:
        address = place.lab.node("b").address
        quiet.wait()
        return float(place.word("a", "send", security, address, port, length_bytes)["ms"])


def round_trips_us(place: Place, times: int = 2000) -> list[float]:
    """Return how long a byte takes from one node to the other and back."""
    with place.serving("b", "echo") as port:
        answer = place.word("a", "ping", place.lab.node("b").address, port, times)
        return [float(each) for each in answer["us"]]


def command_ms(argv: Sequence[str], times: int) -> list[float]:
    """Return the wall time of a command, several times, after three that do not count."""
    took = []
    for _ in range(times + 3):
        quiet.wait()
        started_ns = time.monotonic_ns()
        subprocess.run(argv, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
        took.append((time.monotonic_ns() - started_ns) / 1e6)
    return took[3:]


def python_start_ms(times: int) -> list[float]:
    """Return how long this Python takes to start and end."""
    return command_ms([sys.executable, "-c", "pass"], times)
