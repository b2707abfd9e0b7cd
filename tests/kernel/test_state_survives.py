"""State that is easily lost, each kind in a program that looks for itself whether it still has it."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit import api
from godwit.errors import DestinationError, RefusedError
from godwit.resources import objects, pathfile
from godwit.types import OwnedFd
from tests.conftest import requires
from tests.kernel import stateful as tools
from tests.kernel.counting import DEADLINE_S, state_of, until

pytestmark = requires("root", "command:cc")

KEPT = (
    "temporary_files",
    "sealed_memory",
    "right_to_write",
    "many_timers",
    "many_signals",
    "many_mappings",
    "many_descriptors",
    "robust_mutex",
    "odd_name",
    "attributes",
    "pending_signals",
    "urg_blocked",
    "urg_pending",
    "stopped_child",
    "limits_of_user",
    "every_cpu",
    "last_cpu",
    "critical_section",
)
TOUCHED = ("robust_mutex", "attributes", "pending_signals", "urg_blocked", "urg_pending", "stopped_child")
REFUSED = {
    "leader_ended": "first thread has ended",
    "child_leader_ended": "first thread has ended",
    "thread_user": "a user, capabilities or seccomp filter of its own",
    "thread_sandbox": "a user, capabilities or seccomp filter of its own",
    "semaphores": "System V semaphores",
    "queues": "System V message queue",
    "guard_pages": "guard pages",
    "removed_directory": "it was removed while the program uses it",
    "shared_table": "descriptor table shared with another process",
}
# mov eax, pause; int 0x80; jmp back
CODE_32 = b"\xb8\x1d\x00\x00\x00\xcd\x80\xeb\xf7"
BASE_32 = 0x400000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.compiled(tmp_path_factory.mktemp("stateful"))


@pytest.mark.parametrize("mode", KEPT)
def test_it_is_as_it_was_after_a_move(program: Path, tmp_path: Path, mode: str) -> None:
    with tools.stateful(program, tmp_path, mode) as running:
        tools.move(running, tmp_path)
        assert running.verdict() == "ok"


@pytest.mark.parametrize("mode", TOUCHED)
def test_who_is_left_running_keeps_it_too(program: Path, tmp_path: Path, mode: str) -> None:
    with tools.stateful(program, tmp_path, mode) as running:
        for _ in range(2):
            tools.checkpoint(running, tmp_path, "leave-running")
        assert running.verdict() == "ok"


@requires("command:taskset")
@pytest.mark.parametrize("mode", ["every_cpu", "last_cpu"])
def test_the_cpus_of_who_restores_are_not_inherited(program: Path, tmp_path: Path, mode: str) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("this machine has one CPU")
    with tools.stateful(program, tmp_path, mode) as running:
        tools.move(running, tmp_path, before=["taskset", "-c", str(cpus[0])])
        assert running.verdict() == "ok"


def refused_alike(pid: int, directory: Path) -> str:
    """See check and checkpoint refuse with the same words, and return them."""
    plan = api.inspect(pid)
    assert not plan.movable
    with pytest.raises(RefusedError) as caught:
        api.checkpoint(pid, directory / "refused")
    assert not (directory / "refused").exists()
    assert caught.value.line() == RefusedError(plan.refusals).line()
    return caught.value.line()


@pytest.mark.parametrize("mode", REFUSED)
def test_what_cannot_move_is_refused_and_runs_on(program: Path, tmp_path: Path, mode: str) -> None:
    with present(program, tmp_path, mode) as running:
        assert REFUSED[mode] in refused_alike(running.pid, tmp_path)
        assert running.verdict() == "ok"


@contextlib.contextmanager
def present(program: Path, directory: Path, mode: str) -> Iterator[tools.Stateful]:
    """Run a mode, or skip because this kernel has nothing of the kind."""
    try:
        with tools.stateful(program, directory, mode) as running:
            yield running
    except AssertionError as error:
        if error.args[0] != "absent":
            raise
        pytest.skip(f"this kernel has no {mode.replace('_', ' ')}")


def test_memory_that_refuses_code_is_named(program: Path, tmp_path: Path) -> None:
    """It cannot be seen from outside, so only who stops the program meets it."""
    with present(program, tmp_path, "write_or_execute") as running:
        with pytest.raises(RefusedError, match="PR_SET_MDWE"):
            api.checkpoint(running.pid, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        assert running.verdict() == "ok"


def elf_of_32_bits(path: Path) -> Path:
    """Make an i386 program that pauses for ever."""
    length = 52 + 32 + len(CODE_32)
    ident = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    header = struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, BASE_32 + 84, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<IIIIIIII", 1, 0, BASE_32, BASE_32, length, length, 5, 0x1000)
    path.write_bytes(ident + header + segment + CODE_32)
    path.chmod(0o755)
    return path


def test_a_32_bit_program_is_refused(tmp_path: Path) -> None:
    try:
        process = subprocess.Popen([elf_of_32_bits(tmp_path / "old")], **tools.QUIET)
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs ({error.strerror})")
    try:
        until(lambda: state_of(process.pid) == "S", "it pauses")
        assert "32-bit program" in refused_alike(process.pid, tmp_path)
        assert state_of(process.pid) == "S"
    finally:
        process.kill()
        process.wait(timeout=DEADLINE_S)


@requires("command:unshare")
def test_the_first_process_of_a_pid_namespace_is_refused(program: Path, tmp_path: Path) -> None:
    words = ["unshare", "--pid", "--fork", "--kill-child", str(program), str(tmp_path), "every_cpu"]
    outer: subprocess.Popen[bytes] = subprocess.Popen(words, cwd="/", **tools.QUIET)
    try:
        running = tools.Stateful(outer, tmp_path)
        assert running.wait_for("ready")
        [inner] = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        assert "first process of a pid namespace" in refused_alike(int(inner), tmp_path)
        assert running.verdict() == "ok"
    finally:
        outer.kill()
        outer.wait(timeout=DEADLINE_S)


def described(path: Path) -> pathfile.PathFileEntry:
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return pathfile.describe(fd.number, os.fsencode(path), content=True)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_PATH])
def test_a_link_put_in_place_of_a_file_is_not_followed(tmp_path: Path, flags: int, *, written: bool) -> None:
    mine, secret = tmp_path / "mine", tmp_path / "secret"
    mine.write_text("my own text")
    secret.write_text("others text")
    entry = described(mine)
    pathfile.opened(entry, flags, written=written, what="open file").close()
    mine.unlink()
    mine.symlink_to(secret)
    with pytest.raises(RefusedError, match="mine"):
        pathfile.opened(entry, flags, written=written, what="open file")


def brought_along(path: Path, uid: int) -> objects.ObjectEntry:
    return objects.ObjectEntry(
        object_id=1,
        kind=objects.ObjectKind.CARRIED_FILE,
        name=os.fsencode(path),
        size_bytes=10,
        mode=stat.S_IFREG | 0o640,
        uid=uid,
        gid=uid,
    )


@pytest.mark.parametrize("below", [(), ("new", "newer")])
def test_a_file_is_not_made_where_its_owner_may_not_write(tmp_path: Path, below: tuple[str, ...]) -> None:
    (tmp_path / "roots").mkdir(mode=0o755)
    wanted = (tmp_path / "roots").joinpath(*below, "file")
    with pytest.raises(DestinationError, match="may not make files"):
        objects.restore(brought_along(wanted, 1000))
    assert list((tmp_path / "roots").iterdir()) == []


def test_a_file_is_not_made_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    (tmp_path / "his").mkdir()
    os.chown(tmp_path / "his", 1000, 1000)
    (tmp_path / "his/link").symlink_to(tmp_path / "roots")
    with pytest.raises(DestinationError):
        objects.restore(brought_along(tmp_path / "his/link/file", 1000))
    assert list((tmp_path / "roots").iterdir()) == []


def test_a_file_that_its_owner_may_make_is_his_and_can_be_undone(tmp_path: Path) -> None:
    os.chown(tmp_path, 1000, 1000)
    entry = brought_along(tmp_path / "sub/file", 1000)
    made = objects.restore(entry)
    found = (tmp_path / "sub/file").stat()
    assert (found.st_uid, found.st_gid, found.st_mode, found.st_size) == (1000, 1000, entry.mode, 10)
    objects.discard(entry, made)
    assert not (tmp_path / "sub/file").exists()
