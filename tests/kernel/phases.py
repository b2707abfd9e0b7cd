"""A program that changes what it holds when it is told to, and says what it holds when it is asked.

`phases.py DIR SCRIPT`: a file `next` in DIR brings the next phase, whose number is then in `phase`; a file
`ask` has it write `answer` and end. The script says what a phase does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import select
import socket
import sys
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
ODD = MIB + 1000  # an object may end within a page


class Program:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.held: dict[str, mmap.mmap] = {}
        self.fds: dict[str, int] = {}
        self.words: list[str] = []
        self.children: list[socket.socket] = []

    def map_file(self) -> None:
        path = self.directory / "mapped"
        path.write_bytes(b"f" * MIB)
        fd = os.open(path, os.O_RDONLY)
        self.held["file"] = mmap.mmap(fd, MIB, access=mmap.ACCESS_COPY)
        os.close(fd)
        self.held["file"][:4096] = b"o" * 4096  # a page of our own over it

    def drop_file(self) -> None:
        self.held.pop("file").close()
        (self.directory / "mapped").unlink()

    def make_memfd(self) -> None:
        self.fds["memfd"] = os.memfd_create("late")
        os.write(self.fds["memfd"], b"m" * ODD)

    def empty_memfd(self) -> None:
        os.ftruncate(self.fds["memfd"], 0)
        os.ftruncate(self.fds["memfd"], ODD)

    def make_anonymous(self) -> None:
        self.held["anonymous"] = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.held["anonymous"][:] = b"a" * MIB

    def give_up_anonymous(self) -> None:
        self.held["anonymous"].madvise(mmap.MADV_DONTNEED)

    def execute(self) -> None:
        os.execv(sys.executable, [sys.executable, "-B", __file__, str(self.directory), "executed"])

    def begin_child(self) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            while theirs.recv(1):  # until the parent ends
                os.setsid()
                theirs.send(b"x")
            os._exit(0)
        self.children.append(ours)

    def send_child_away(self) -> None:
        self.children[0].send(b"x")
        self.children[0].recv(1)

    def answer(self) -> str:
        told = dict.fromkeys(self.words, "")
        for name, memory in self.held.items():
            told[name] = hashlib.sha256(memory[:]).hexdigest()[:8]
        if "memfd" in self.fds:
            told["memfd"] = hashlib.sha256(os.pread(self.fds["memfd"], ODD, 0)).hexdigest()[:8]
        return " ".join(f"{name}={digest}" for name, digest in sorted(told.items()))


def say(path: Path, text: str) -> None:
    """Write a file in one step, with no descriptor open at any moment when it can be seen."""
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.rename(path)


def main() -> None:
    directory, script = Path(sys.argv[1]), sys.argv[2]
    program = Program(directory)
    phases: dict[str, list[Callable[[], None]]] = {
        "file": [program.map_file, program.drop_file],
        "memfd": [lambda: None, program.make_memfd, program.empty_memfd],
        "object": [program.make_memfd, program.empty_memfd],
        "anonymous": [program.make_anonymous, program.give_up_anonymous],
        "exec": [program.make_anonymous, program.execute],
        "executed": [lambda: program.words.append("executed")],
        "fork": [program.make_anonymous, program.begin_child],
        "session": [program.begin_child, program.send_child_away],
    }
    for number, phase in enumerate(phases[script]):
        (directory / "next").unlink(missing_ok=True)
        phase()
        say(directory / "phase", f"{script} {number}")
        while not (directory / "next").exists():
            if (directory / "ask").exists():
                say(directory / "answer", f"{script} {number}: {program.answer()}")
                return
            select.select([], [], [], 0.005)


if __name__ == "__main__":
    main()
