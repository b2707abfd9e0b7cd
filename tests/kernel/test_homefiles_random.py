"""A file at the host holds what was written to it, whatever the order of reads, writes and mappings."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest

from tests.kernel.homefiles import served

# Threads act as others, which marks the whole process (PR_SET_DUMPABLE): not among the everyday tests.
pytestmark = [pytest.mark.requires("root"), pytest.mark.slow]

SIZE = 1 << 20
STEPS = 600


class Model:
    """A file and what must be in it."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path = path
        self.chance = chance
        self.content = bytearray()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def place(self) -> tuple[int, int]:
        start = self.chance.randrange(SIZE)
        return start, self.chance.randint(1, min(SIZE - start, 70000))

    def write(self) -> None:
        start, length = self.place()
        data = self.chance.randbytes(length)
        assert os.pwrite(self.fd, data, start) == length
        self.content.extend(bytes(max(0, start - len(self.content))))
        self.content[start : start + length] = data

    def read(self) -> None:
        start, length = self.place()
        assert os.pread(self.fd, length, start) == self.content[start : start + length]

    def truncate(self) -> None:
        size = self.chance.randrange(SIZE)
        os.ftruncate(self.fd, size)
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))

    def write_mapping(self) -> None:
        if not self.content:
            return
        with mmap.mmap(self.fd, len(self.content)) as memory:
            start = self.chance.randrange(len(self.content))
            data = self.chance.randbytes(min(5000, len(self.content) - start))
            memory[start : start + len(data)] = data
            if self.chance.random() < 0.5:
                memory.flush()
        self.content[start : start + len(data)] = data

    def read_mapping(self) -> None:
        if self.content:
            with mmap.mmap(self.fd, len(self.content), prot=mmap.PROT_READ) as memory:
                assert memory[:] == self.content

    def open_again(self) -> None:
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)
        assert os.fstat(self.fd).st_size == len(self.content)


@pytest.mark.parametrize("watched_ttl_ns", [0, 600 * 10**9])
@pytest.mark.parametrize("how", ["direct", "socket"])
def test_random_use_of_a_file(tmp_path: Path, how: str, watched_ttl_ns: int) -> None:
    (tmp_path / "home").mkdir()
    with served(tmp_path / "home", tmp_path / "mnt", how, watched_ttl_ns=watched_ttl_ns) as tree:
        model = Model(tree.host / "a", random.Random(7))
        steps = [
            model.write,
            model.read,
            model.truncate,
            model.write_mapping,
            model.read_mapping,
            model.open_again,
        ]
        for _ in range(STEPS):
            model.chance.choices(steps, weights=[6, 6, 1, 2, 2, 1])[0]()
        os.fsync(model.fd)
        os.close(model.fd)
        assert (tree.home / "a").read_bytes() == model.content
