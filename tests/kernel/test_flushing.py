"""What a program has written to a shared file system goes there before another machine reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from godwit.engine import flushing, view
from godwit.linux import statfs
from godwit.types import Pid
from tests.conftest import requires

pytestmark = requires("root")

PROGRAM = """
import mmap, os, sys, time
written, mapped, read = sys.argv[1:]
first = open(written, "w")
fd = os.open(mapped, os.O_RDWR)
second = mmap.mmap(fd, 4096)
os.close(fd)
third = open(read)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("several", [True, False])
def test_written_files_of_several_machines_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    paths = [tmp_path / name for name in ("written", "mapped", "read")]
    for path in paths:
        path.write_bytes(bytes(4096))
    words = [sys.executable, "-c", PROGRAM, *map(str, paths)]
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(statfs, "may_be_shared", lambda _: several)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            tree, _ = view.settled(Pid(process.pid), view.Memory(), lambda _: None)
            flushing.flush_shared(tree)
        finally:
            process.kill()
    wanted = [path.stat().st_ino for path in paths[:2]] if several else []
    assert sorted(flushed) == sorted(wanted)
