"""What a program shares with others, and begins to share while it is being moved, keeps it here."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from godwit.errors import RefusedError
from godwit.lab.cluster import Lab
from tests.conftest import requires
from tests.journey.live import Watched
from tests.journey.transfer import GODWIT, complaint, environment, is_empty
from tests.workloads.driver import wait_until

pytestmark = requires("root")

QUIET_TIMEOUT_S = 20.0
# Once told to, has a grandchild whose father ends: it shares what it was born with, and is no descendant.
LEAVER = """
import mmap, os, sys, time
sign, what = sys.argv[1:3]
memory = bytearray(os.urandom(1 << 20)) * 24
ends = os.pipe() if what == "pipe" else ()
ours = mmap.mmap(-1, 4096) if what == "memory" else None
file = os.memfd_create("ours") if what == "memfd" else -1
open(sign + ".ready", "x").close()
while not os.path.exists(sign + ".leave"):
    time.sleep(0.005)
if os.fork() == 0:
    if os.fork() == 0:
        open(sign + ".left", "x").close()
        while True:
            time.sleep(1)
    os._exit(0)
os.wait()
while True:
    time.sleep(0.005)
"""
# Two processes, of which neither descends from the other, and one file without a name.
UNNAMED = """
import mmap, os, sys, time
sign, how = sys.argv[1:3]
file = os.open("/dev/shm/unnamed" + os.path.basename(sign), os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 4096)
os.unlink("/dev/shm/unnamed" + os.path.basename(sign))
ours = mmap.mmap(file, 4096)
if how == "mapped":
    os.close(file)
read, write = os.pipe()
if os.fork() == 0:
    os.close(write)
    if os.fork() == 0:
        os.close(read)
        os.setsid()
        open(sign + ".left", "w").write("x")
        while True:
            time.sleep(1)
    os._exit(0)
os.wait()
os.close(read), os.close(write)
open(sign + ".ready", "x").close()
while True:
    time.sleep(0.005)
"""


@pytest.fixture
def sign(lab: Lab, shared: Path) -> Iterator[Path]:
    found = shared / uuid.uuid4().hex
    try:
        yield found
    finally:
        for node in lab.nodes:
            for pid in node.pids():
                node.run(["kill", "-KILL", str(pid)])
            assert wait_until(partial(is_empty, node), QUIET_TIMEOUT_S)


@pytest.mark.parametrize("what", ["pipe", "memory", "memfd"])
def test_a_grandchild_that_leaves_in_the_rounds_keeps_it_here(lab: Lab, sign: Path, what: str) -> None:
    words = [sys.executable, "-c", LEAVER, f"/shared/{sign.name}", what]
    with contextlib.closing(lab.node("a").start(words, env=environment())) as started:
        assert wait_until(sign.with_suffix(".ready").exists, QUIET_TIMEOUT_S)
        line = [*GODWIT, "migrate", str(started.node_pid), "b", "--bandwidth", "12MB/s"]
        with Watched(lab.node("a"), line, 0) as command:
            command.wait_for("round|copying")
            sign.with_suffix(".leave").touch()
            assert wait_until(sign.with_suffix(".left").exists, QUIET_TIMEOUT_S)
            done = command.finish()
        assert done.returncode == RefusedError.exit_status, done.stderr
        assert "was born since" in done.stderr
        assert lab.node("b").pids() == []


@pytest.mark.parametrize("how", ["mapped", "open"])
def test_a_file_without_a_name_that_another_has_too_keeps_it_here(lab: Lab, sign: Path, how: str) -> None:
    words = [sys.executable, "-c", UNNAMED, f"/shared/{sign.name}", how]
    with contextlib.closing(lab.node("a").start(words, env=environment())) as started:
        assert wait_until(sign.with_suffix(".ready").exists, QUIET_TIMEOUT_S)
        done = lab.node("a").run([*GODWIT, "check", str(started.node_pid)], env=environment())
        assert done.returncode == RefusedError.exit_status, complaint(done)
        assert b"does not move along" in done.stdout + done.stderr
