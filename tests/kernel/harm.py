"""What can happen to a move: deaths, lines that end or fall silent, and what there is too little of."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.kernel import bell
from tests.kernel import counting as tools
from tests.kernel.counting import Counting, Machine, Pair, Server
from tests.kernel.proxy import Proxy

CGROUPS: Final = Path("/sys/fs/cgroup/memory")
# At these the program runs at the destination already.
AWAY: Final = {
    ("source", "pushed"),
    ("source", "killed"),
    ("destination", "released"),
    ("destination", "told"),
    ("destination", "paged"),
    ("destination", "drained"),
}


@dataclass(frozen=True)
class Case:
    """One thing that happens."""

    role: str
    step: str
    fault: str
    strategy: str

    @property
    def name(self) -> str:
        return f"{self.role}-{self.step}-{self.fault}-{self.strategy}"


@dataclass
class Scene:
    """A move in which something happens."""

    case: Case
    counter: Counting
    pair: Pair
    server: Server
    proxy: Proxy
    mover: subprocess.Popen[str]
    pods_before: frozenset[int]
    ringer: int = 0
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    # --- who is who ---------------------------------------------------------------------------

    def source_worker(self) -> int:
        return self.ringer if self.case.role == "source" else children(self.mover.pid)[0]

    def destination(self) -> list[int]:
        """Return who serves the line and its worker, so far as there are any."""
        if self.case.role == "destination":
            return [parent(self.ringer), self.ringer]
        # Of the first line: a later one serves questions.
        found = children(self.server.process.pid)[:1]
        return [*found, *(children(found[0]) if found else [])][:2]

    def pods(self) -> list[int]:
        return [init for init in tools.pods() if init not in self.pods_before]

    def copies_away(self) -> list[int]:
        return [pid for init in self.pods() for pid in children(init)]

    def runs_away(self) -> bool:
        return (self.case.role, self.case.step) in AWAY


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- what happens -------------------------------------------------------------------------------


def kill_source_worker(scene: Scene) -> None:
    bell.end(scene.source_worker())


def kill_source_parent(scene: Scene) -> None:
    bell.end(scene.mover.pid)


def kill_source_both(scene: Scene) -> None:
    os.killpg(scene.mover.pid, signal.SIGKILL)


def kill_destination_worker(scene: Scene) -> None:
    for pid in scene.destination()[1:]:
        bell.end(pid)


def kill_destination_parent(scene: Scene) -> None:
    for pid in scene.destination()[:1]:
        bell.end(pid)


def kill_destination_both(scene: Scene) -> None:
    for pid in scene.destination():
        bell.end(pid)


def kill_program(scene: Scene) -> None:
    for pid in scene.copies_away() if scene.runs_away() else [scene.counter.pid]:
        bell.end(pid)


def kill_other_copy(scene: Scene) -> None:
    """Kill what does not run: what is being built, or what the last pages are read from."""
    for pid in [scene.counter.pid] if scene.runs_away() else (scene.copies_away() or scene.pods()):
        bell.end(pid)


def cut_line(scene: Scene) -> None:
    scene.proxy.cut()


def stall_line(scene: Scene) -> None:
    scene.proxy.stall()


def stall_next_line(scene: Scene) -> None:
    """Cut the line; the one that takes its place falls silent once it has been agreed on."""
    scene.proxy.next_room_bytes = 1 << 14
    scene.proxy.cut()


def fill_disk(machine: Callable[[Scene], Machine]) -> Callable[[Scene], None]:
    def fill(scene: Scene) -> None:
        filler = machine(scene).journal / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        scene.undo.callback(filler.unlink)

    return fill


def limit_memory(scene: Scene) -> None:
    """Give the destination's worker no more addresses: every larger allocation fails."""
    for pid in scene.destination()[1:]:
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size, size))


def limit_cgroup(scene: Scene) -> None:
    """Give the destination's worker, and what it makes from now on, 256 KiB: the kernel kills one of them."""
    group = CGROUPS / f"godwit-test-{uuid.uuid4().hex}"
    group.mkdir()
    scene.undo.callback(lambda: leave_cgroup(group))
    (group / "memory.limit_in_bytes").write_text(str(256 << 10))
    for pid in scene.destination()[1:]:
        with contextlib.suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(pid))


def leave_cgroup(group: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            (group.parent / "cgroup.procs").write_text(pid)
    tools.until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
    group.rmdir()


FAULTS: Final[dict[str, Callable[[Scene], None]]] = {
    "source mover killed": kill_source_worker,
    "source command killed": kill_source_parent,
    "source mover and command killed": kill_source_both,
    "destination mover killed": kill_destination_worker,
    "destination server killed": kill_destination_parent,
    "destination mover and server killed": kill_destination_both,
    "program killed": kill_program,
    "other copy killed": kill_other_copy,
    "line cut": cut_line,
    "line stalled": stall_line,
    "line cut and the next stalled": stall_next_line,
    "source disk full": fill_disk(lambda scene: scene.pair.source),
    "destination disk full": fill_disk(lambda scene: scene.pair.destination),
    "receiver out of addresses": limit_memory,
    "receiver out of memory": limit_cgroup,
}
