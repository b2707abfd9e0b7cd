"""Directories of home, and the same directories as a host sees them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOST = Path(__file__).with_name("homefiles_host.py")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Served:
    """A directory at home, and where it is at the host, for programs of this mount namespace."""

    home: Path
    host: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> None:
        """Have the pump end the connection, and the server the rest."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=20) == 0

    def requests(self) -> int:
        """Count the messages that the host's kernel has sent."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"?")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    @property
    def enter(self) -> list[str]:
        """What to put before a command that is to run at the host, in the exported directory."""
        inside = str(self.host).partition("/root")[2]
        # The --wd of nsenter would be a directory of this namespace.
        return ["nsenter", "-m", "-t", str(self.pid), "env", "-C", inside]

    def run(self, *command: str) -> str:
        """Return what a command prints that runs at the host."""
        enter = [*self.enter, *command]
        return subprocess.run(enter, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout


@contextlib.contextmanager
def served(home: Path, mountpoint: Path, how: str = "direct", **options: object) -> Iterator[Served]:
    mountpoint.mkdir(exist_ok=True)
    host = subprocess.Popen(
        [sys.executable, str(HOST), str(home), str(mountpoint), how, repr(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    )
    assert host.stdin is not None
    assert host.stdout is not None
    try:
        assert host.stdout.readline() == b"ready\n"
        tree = Served(home, Path(f"/proc/{host.pid}/root{mountpoint}"), host)
        yield tree
        tree.end()
    finally:
        host.kill()
        host.wait()
        host.stdin.close()
        host.stdout.close()
