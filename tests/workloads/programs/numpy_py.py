"""A big array checked and rewritten block by block, exact matrix products in threads, a child on a pipe.

Option `mib=N`: size of the array, 256 by default. The expected sums follow from arithmetic modulo 2^64,
not from the data, so a changed word cannot vouch for itself.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")

import numpy as np
import numpy.typing as npt
from life import MARKER_BYTES, BadError, Life, check, conclude, marker, nap

BLOCK_WORDS = 128 * 1024  # 1 MiB
FACTOR = 6364136223846793005
STEP = 1442695040888963407
MASK = (1 << 64) - 1
MATRIX = 192
CHILD = Path(__file__).with_name("numpy_child.py")


class Array:
    """Blocks of words, each with two expected sums: plain, and weighted by place."""

    def __init__(self, mib: int) -> None:
        self.blocks = mib
        self.words = np.arange(mib * BLOCK_WORDS, dtype=np.uint64) * np.uint64(FACTOR)
        self.weights = np.arange(BLOCK_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self.weight_sum = BLOCK_WORDS * BLOCK_WORDS  # of the first odd numbers
        place = self.words[:2].view(np.uint8)
        for index in range(MARKER_BYTES):
            place[index] = marker(index)
        self.expected = [self.sums(block) for block in range(mib)]

    def block(self, number: int) -> npt.NDArray[np.uint64]:
        """A view of one block."""
        return self.words[number * BLOCK_WORDS : (number + 1) * BLOCK_WORDS]

    def sums(self, number: int) -> tuple[int, int]:
        """What the block adds up to now."""
        block = self.block(number)
        return int(block.sum(dtype=np.uint64)), int((block * self.weights).sum(dtype=np.uint64))

    def verify(self, number: int) -> None:
        """Raise unless the block is what arithmetic says."""
        found = self.sums(number)
        check(found == self.expected[number], f"block {number} sums to {found}, not {self.expected[number]}")

    def rewrite(self, number: int) -> None:
        """Replace x by FACTOR * x + STEP, and note what the sums must become. Block 0 keeps its marker."""
        plain, weighted = self.expected[number]
        block = self.block(number)
        if number == 0:
            return
        block *= np.uint64(FACTOR)
        block += np.uint64(STEP)
        self.expected[number] = (
            (FACTOR * plain + STEP * BLOCK_WORDS) & MASK,
            (FACTOR * weighted + STEP * self.weight_sum) & MASK,
        )


class Multiplier(threading.Thread):
    """Multiplies matrices of small integers with BLAS: floating point, and yet exact."""

    def __init__(self, seed: int) -> None:
        super().__init__(daemon=True)
        random = np.random.default_rng(seed)
        self.left = random.integers(-9, 9, (MATRIX, MATRIX))
        self.right = random.integers(-9, 9, (MATRIX, MATRIX))
        self.rounds = 0
        self.problem = ""
        self.leave = threading.Event()

    def run(self) -> None:
        """Multiply until told to leave; a wrong product ends the thread."""
        exact = self.left @ self.right
        left, right = self.left.astype(np.float64), self.right.astype(np.float64)
        while not self.leave.wait(0.005):
            if not np.array_equal(left @ right, exact):
                self.problem = f"a matrix product is wrong in round {self.rounds}"
                return
            self.rounds += 1


class Child:
    """Another Python that hashes what it is sent."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(CHILD), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.number = 0

    def ask(self, payload: bytes) -> None:
        """Raise unless the child hashes the payload right, in turn, from the same pid."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.number += 1
        self.process.stdin.write(b"%d %s\n" % (self.number, payload.hex().encode()))
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        digest = hashlib.sha256(payload).hexdigest().encode()
        wanted = [b"%d" % self.number, digest, b"%d" % self.process.pid]
        check(answer == wanted, f"the child said {answer}, not {wanted}")

    def end(self) -> None:
        """Close the pipe and expect the exit status that counts the questions."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = self.process.wait()
        check(status == self.number % 64, f"the child ended with {status}, not {self.number % 64}")


def work(life: Life) -> str:
    """Compute until told to stop, then verify all of it."""
    mib = next((int(word[4:]) for word in sys.argv if word.startswith("mib=")), 256)
    array, child = Array(mib), Child()
    threads = [Multiplier(seed) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    number = 0
    while not life.stopping():
        block = number % array.blocks
        array.verify(block)
        array.rewrite(block)
        if number % 8 == 0:
            child.ask(array.block(block)[:32].tobytes())
        for thread in threads:
            check(thread.is_alive(), thread.problem or "a thread is gone")
        number += 1
        life.alive()
        nap(0.004)
    for thread in threads:
        thread.leave.set()
        thread.join()
        if thread.problem or thread.rounds == 0:
            raise BadError(thread.problem or "a thread never multiplied")
    for block in range(array.blocks):
        array.verify(block)
    child.end()
    return f"{number} blocks, {[thread.rounds for thread in threads]} products"


if __name__ == "__main__":
    conclude(Life(sys.argv[1]), work)
