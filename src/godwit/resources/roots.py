"""Where the names of a tree begin at this machine: its own root, or the one that a pod is given."""

from __future__ import annotations

import os
from dataclasses import dataclass

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
