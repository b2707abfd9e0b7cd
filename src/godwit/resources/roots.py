"""Where the names of a tree begin at this machine: its own root, or the one that a pod is given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from godwit.linux import openat2
from godwit.types import OwnedFd


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A root directory. Ours, unless there is a descriptor of another one."""

    directory: OwnedFd | None = None
    at_home: bool = False
    """The files below it are the home machine's own, so what a name leads to is what it led to there."""

    def open(self, path: bytes, flags: int) -> OwnedFd:
        """Open an absolute path, close-on-exec. Raises OSError as open(2)."""
        if self.directory is None:
            return OwnedFd(os.open(path, flags | os.O_CLOEXEC))
        return openat2.open_in_root(self.directory.number, path, flags)


OURS = Root()


def at_home(directory: Path) -> Root:
    """Return a root at which the files of the home machine are mounted. Raises OSError."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    return Root(directory=OwnedFd(os.open(directory, flags)), at_home=True)
