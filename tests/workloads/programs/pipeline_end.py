"""The ends of a pipeline: `produce` writes numbered blocks that do not compress, `check` expects these."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from life import BadError, check, nap

BLOCK_BYTES = 4096


def block_of(number: int) -> bytes:
    """The only right content of a block."""
    return number.to_bytes(8, "big") + hashlib.shake_128(b"%d" % number).digest(BLOCK_BYTES - 8)


def produce() -> None:
    """Write blocks to stdout until told to stop; leave count and digest in `produced`."""
    digest, number = hashlib.sha256(), 0
    while not os.path.exists("stop"):
        number += 1
        block = block_of(number)
        digest.update(block)
        sent = 0
        while sent < BLOCK_BYTES:
            sent += os.write(1, block[sent:])
        nap(0.001)
    Path("produced").write_text(f"{number} blocks {digest.hexdigest()}\n")


def consume() -> None:
    """Read blocks from stdin until it ends; leave count and digest in `checked`."""
    digest, number = hashlib.sha256(), 0
    alive = os.open("alive", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    while block := sys.stdin.buffer.read(BLOCK_BYTES):
        number += 1
        check(block == block_of(number), f"block {number} is wrong: {block[:8]!r}, {len(block)} bytes")
        digest.update(block)
        os.pwrite(alive, b"%020d\n" % number, 0)
    Path("checked").write_text(f"{number} blocks {digest.hexdigest()}\n")


if __name__ == "__main__":
    try:
        {"produce": produce, "check": consume}[sys.argv[1]]()
    except (BadError, OSError) as error:
        Path("problem").write_text(f"{sys.argv[1]}: {error}\n")
        sys.exit(1)
