"""The program that flies in the demonstration. It knows nothing of Godwit and is run as a script.

Two threads rewrite an array block by block, a child on a pipe adds each step to a chain of hashes,
and a numbered line about it is appended to a log every few milliseconds. What the sums must be
follows from arithmetic modulo 2^64 alone (`Expectation`), so a changed word cannot vouch for itself.
SIGTERM ends it: it then looks at the whole array once more, and writes a verdict.

    flyer.py LOG VERDICT numpy|plain
    flyer.py chain                      the child
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

WORKERS = 2
PACE_S = 0.004
FACTOR = 6364136223846793005
STEP = 1442695040888963407
MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How much each worker holds."""

    blocks: int
    words: int  # of 64 bits, in a block


SHAPES = {
    "numpy": Shape(blocks=64, words=64 * 1024),
    "plain": Shape(blocks=64, words=512),
}


class Expectation:
    """What the weighted sum of each block is, step by step, without the block."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        words = shape.words
        # Word i of a block that begins at `start` holds FACTOR * (start + i) and weighs 2 * i + 1.
        plain = words * (words - 1) // 2
        squares = (words - 1) * words * (2 * words - 1) // 6
        self.sums = [
            [
                FACTOR * (((worker * shape.blocks + block) * words) * words * words + 2 * squares + plain)
                & MASK
                for block in range(shape.blocks)
            ]
            for worker in range(WORKERS)
        ]

    def step(self, number: int) -> int:
        """Rewrite the blocks that step `number` rewrites; return the sum of their sums."""
        block = number % self.shape.blocks
        total = 0
        for sums in self.sums:
            # The weights are the first odd numbers, and add up to words squared.
            sums[block] = (FACTOR * sums[block] + STEP * self.shape.words**2) & MASK
            total += sums[block]
        return total & MASK


def link(before: bytes, number: int, total: int) -> bytes:
    """Add a step to the chain of hashes."""
    return hashlib.sha256(before + b"%d %d" % (number, total)).digest()


class Words(Protocol):
    """One worker's words."""

    def rewrite(self, block: int) -> int:
        """Replace each x of a block by FACTOR * x + STEP; return the weighted sum."""
        ...

    def weigh(self, block: int) -> int:
        """Return the weighted sum of a block as it is."""
        ...


class NumpyWords:
    """Words in a numpy array."""

    def __init__(self, shape: Shape, worker: int) -> None:
        import numpy as np

        count = shape.blocks * shape.words
        self._np: Any = np
        self._words = np.arange(worker * count, (worker + 1) * count, dtype=np.uint64)
        self._words *= np.uint64(FACTOR)
        self._rows = self._words.reshape(shape.blocks, shape.words)
        self._weights = np.arange(shape.words, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def rewrite(self, block: int) -> int:
        """See `Words`."""
        row = self._rows[block]
        row *= self._np.uint64(FACTOR)
        row += self._np.uint64(STEP)
        return self.weigh(block)

    def weigh(self, block: int) -> int:
        """See `Words`."""
        return int((self._rows[block] * self._weights).sum(dtype=self._np.uint64))


class PlainWords:
    """Words in an array of the standard library, for where there is no numpy."""

    def __init__(self, shape: Shape, worker: int) -> None:
        count = shape.blocks * shape.words
        self._size = shape.words
        self._words = array(
            "Q", (FACTOR * each & MASK for each in range(worker * count, (worker + 1) * count))
        )

    def rewrite(self, block: int) -> int:
        """See `Words`."""
        for place in range(block * self._size, (block + 1) * self._size):
            self._words[place] = (FACTOR * self._words[place] + STEP) & MASK
        return self.weigh(block)

    def weigh(self, block: int) -> int:
        """See `Words`."""
        row = self._words[block * self._size : (block + 1) * self._size]
        return sum(word * (2 * place + 1) for place, word in enumerate(row)) & MASK


KINDS: dict[str, type[NumpyWords | PlainWords]] = {"numpy": NumpyWords, "plain": PlainWords}


class Worker(threading.Thread):
    """Rewrites the block it is told to, and answers with its sum."""

    def __init__(self, words: Words) -> None:
        super().__init__(daemon=True)
        self.words = words
        self.orders: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.sums: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(self) -> None:
        """Work for ever."""
        while True:
            self.sums.put(self.words.rewrite(self.orders.get()))


class Chain:
    """The child that keeps the chain of hashes, in its own memory only."""

    def __init__(self) -> None:
        argv = [sys.executable, "-I", str(Path(__file__).resolve()), "chain"]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def add(self, number: int, total: int) -> str:
        """Add a step; return the end of the chain in hexadecimal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"%d %d\n" % (number, total))
        self._process.stdin.flush()
        return self._process.stdout.readline().decode().strip()

    def end(self) -> int:
        """Close the pipe, and return the child's exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait()


def chain() -> None:
    """Be the child: a line in, a line out."""
    value = b""
    for line in sys.stdin.buffer:
        number, total = line.split()
        value = link(value, int(number), int(total))
        sys.stdout.write(value.hex() + "\n")
        sys.stdout.flush()


def fly(log_name: str, verdict_name: str, kind: str) -> None:
    """Work until SIGTERM comes."""
    import time

    # Blocked, so that it ends the wait below, and nothing else. Threads and child inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    shape, pid, pid_changes = SHAPES[kind], os.getpid(), 0
    child = Chain()
    workers = [Worker(KINDS[kind](shape, number)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    log = os.open(log_name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    number = 0
    while signal.sigtimedwait([signal.SIGTERM], PACE_S) is None:
        number += 1
        for worker in workers:
            worker.orders.put(number % shape.blocks)
        total = sum(worker.sums.get() for worker in workers) & MASK
        end = child.add(number, total)
        pid_changes += os.getpid() != pid
        os.write(log, b"%d %d %d %s\n" % (number, time.time_ns(), total, end.encode()))
    verdict = {
        "lines": number,
        "wrong_blocks": _wrong_blocks(shape, workers, number),
        "child_status": child.end(),
        "pid_changes": pid_changes,
    }
    draft = Path(verdict_name + ".new")
    draft.write_text(json.dumps(verdict))
    draft.rename(verdict_name)


def _wrong_blocks(shape: Shape, workers: list[Worker], steps: int) -> int:
    expected = Expectation(shape)
    for number in range(1, steps + 1):
        expected.step(number)
    return sum(
        worker.words.weigh(block) != sums[block]
        for worker, sums in zip(workers, expected.sums, strict=True)
        for block in range(shape.blocks)
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["chain"]:
        chain()
    else:
        fly(*sys.argv[1:])
