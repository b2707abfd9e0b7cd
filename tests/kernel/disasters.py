"""What must hold whatever happens at whatever step of a move.

A case is a strategy, a step of one of the two state machines and a fault. `suffer` has the fault happen while
the process that reached the step waits in it, sees what survived, and that nothing else is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from godwit.linux import abi
from godwit.migrate.faults import DESTINATION_STEPS, SOURCE_STEPS
from tests.kernel import bell
from tests.kernel import counting as tools
from tests.kernel.bell import Bell
from tests.kernel.counting import Outcome, Pair
from tests.kernel.harm import FAULTS, Case, Scene, children
from tests.kernel.proxy import Proxy

MIB: Final = 8
LINES_OF_ALL: Final = 8 * MIB + 20  # the program has looked at all of its memory by then
BANDWIDTH: Final = 30e6
PATIENCE_S: Final = 1.0
NOBODY: Final = "nobody"

STEPS: Final = [
    *(("source", step) for step in SOURCE_STEPS),
    *(("destination", step) for step in DESTINATION_STEPS),
]
NEVER: Final = {
    "stopcopy": {"round", "pushed", "paged", "drained"},
    "precopy": {"pushed", "paged", "drained"},
    "hybrid": set[str](),
    "postcopy": {"round"},
}

DRAIN: Final = {("source", "pushed"), ("destination", "paged")}
# What is not there at a step, or is not different from something else.
VAIN: Final = {
    "line cut and the next stalled": {step for step in STEPS if step not in DRAIN},
    "destination mover killed": {("source", "connected"), ("source", "planned")},
    "receiver out of addresses": {("source", "connected"), ("source", "planned")},
    "receiver out of memory": {("source", "connected"), ("source", "planned")},
    "other copy killed": {("source", "connected"), ("source", "planned"), ("destination", "greeted")},
}


@dataclass(frozen=True)
class Result:
    """What came of it."""

    case: Case
    survived: str  # source, destination or nobody
    settled: str
    seconds: float


def cases() -> list[Case]:
    """Return the whole matrix, but for `stopcopy`: nothing happens in it that does not in `precopy`."""
    return [
        Case(role, step, fault, strategy)
        for role, step in STEPS
        for fault in FAULTS
        for strategy, never in NEVER.items()
        if step not in never and strategy != "stopcopy" and (role, step) not in VAIN.get(fault, ())
    ]


def covering() -> list[Case]:
    """Return a part in which every step, every fault and every strategy occurs."""
    chosen = []
    for number, (role, step) in enumerate(STEPS):
        able = [strategy for strategy, never in NEVER.items() if step not in never and strategy != "stopcopy"]
        for other, fault in enumerate(FAULTS):
            # Told that it runs, and stopped still: see `Pending.released`.
            parked = step == "told" and fault.startswith("destination")
            if (number + other) % 6 == 0 or step in ("pushed", "paged") or parked:
                chosen.append(Case(role, step, fault, able[(number * 3 + other) % len(able)]))
    known = set(cases())
    return [case for case in chosen if case in known]


# --- a move in which it happens -----------------------------------------------------------------


@contextlib.contextmanager
def small_disks(pair: Pair) -> Iterator[None]:
    """Give both journals a file system of their own of 64 KiB."""
    with contextlib.ExitStack() as undo:
        for machine in (pair.source, pair.destination):
            machine.journal.mkdir(exist_ok=True)
            place = os.fsencode(machine.journal) + b"\0"
            abi.syscall("mount", b"none\0", place, b"tmpfs\0", 0, b"size=64k\0")
            undo.callback(abi.syscall, "umount2", place, 2)
        yield


@contextlib.contextmanager
def scene_of(case: Case, program: Path, pair: Pair, directory: Path) -> Iterator[tuple[Scene, str]]:
    """Begin a move that waits at the step of the case; yield it with the token of its processes."""
    token = uuid.uuid4().hex
    before = frozenset(tools.pods())
    with contextlib.ExitStack() as stack:
        if "disk" in case.fault:
            stack.enter_context(small_disks(pair))
        ring = Bell()
        stack.callback(ring.close)
        times = 3 if case.step in ("pushed", "paged") else 1
        extra = {
            **ring.environment(f"{case.role}:{case.step}:{times}"),
            bell.PATIENCE: str(PATIENCE_S),
            "GODWIT_TEST_STRATEGY": case.strategy,
            "GODWIT_TEST_BANDWIDTH": str(BANDWIDTH),
        }
        counter = stack.enter_context(tools.counting(program, directory, MIB))
        server = stack.enter_context(tools.serving(pair.destination, **extra))
        proxy = Proxy(server.address)
        stack.callback(proxy.close)
        mover = tools.start_move(counter.pid, proxy.host, pair.source, GODWIT_TEST_MOVER=token, **extra)
        stack.callback(end_mover, mover, token)
        scene = Scene(case, counter, pair, server, proxy, mover, before)
        stack.enter_context(scene.undo)
        with ring.rung(mover.pid, 20) as scene.ringer:
            assert scene.ringer, f"step {case.step} was not reached: {mover.communicate(timeout=5)[0]}"
            FAULTS[case.fault](scene)
        yield scene, token


def end_mover(mover: subprocess.Popen[str], token: str) -> None:
    for pid in movers(token):
        bell.end(pid)
    mover.communicate(timeout=10)


def movers(token: str) -> list[int]:
    return tools.carrying(f"GODWIT_TEST_MOVER={token}", "environ")


def suffer(case: Case, program: Path, pair: Pair, directory: Path) -> Result:
    """Have it happen; see that one copy survives, or none if it was killed itself, and nothing else."""
    began = time.monotonic()
    with scene_of(case, program, pair, directory) as (scene, token):
        if "disk" in case.fault or "memory" in case.fault:
            # Room is made again after a while; the move may wait for it.
            timer = threading.Timer(1.0, scene.undo.close)
            timer.start()
            scene.undo = contextlib.ExitStack()
        else:
            timer = None
        outcome = tools.finish_move(scene.mover)
        tools.until(lambda: not movers(token), "the movers end")
        if timer is not None:
            timer.join()
        scene.proxy.end_stalled()
        scene.server.wait_until_idle()
        settled = "by itself"
        if undecided(scene):
            settled = "godwit recover"
            assert may_need_recovery(case) or loses_pages(case, outcome), undecided(scene)
            scene.pair.source.recover()
            scene.server.wait_until_idle()
            scene.pair.destination.recover()
        survived = survivor(scene, outcome)
        nothing_else_is_left(scene)
        return Result(case, survived, settled, round(time.monotonic() - began, 2))


def undecided(scene: Scene) -> list[str]:
    """Tell what waits for somebody's decision."""
    records = [*scene.pair.source.records(), *scene.pair.destination.undecided()]
    stopped = [pid for pid in scene.counter.copies() if tools.state_of(pid) in "Tt"]
    lists = scene.pair.destination.journal.glob("*.pending")
    return [
        *(f"{each.role} {each.state}" for each in records),
        *(f"{pid} stopped" for pid in stopped),
        *(path.name for path in lists),
    ]


def may_need_recovery(case: Case) -> bool:
    """One of the two that watch over each other is enough; and who lost both waits for `godwit recover`."""
    return "killed" in case.fault and case.fault not in (
        "source mover killed",
        "destination mover killed",
        "program killed",
        "other copy killed",
    )


def survivor(scene: Scene, outcome: Outcome) -> str:
    """Return who lives, having seen that it is well and the one that was named."""
    if loses_pages(scene.case, outcome):
        return nobody_after_all(scene, outcome)
    if may_be_dead(scene.case):
        with contextlib.suppress(AssertionError):
            tools.until(lambda: not scene.counter.copies(), "nobody lives", 1.0)
    if may_be_dead(scene.case) and not scene.counter.copies():
        scene.counter.check_log()
        return NOBODY
    pid = scene.counter.only_copy()
    scene.counter.wait_for_progress(LINES_OF_ALL)
    scene.counter.check_log()
    found = "source" if pid == scene.counter.pid else "destination"
    assert outcome.survivor in ("", "undecided", found), outcome
    assert outcome.survivor or outcome.status < 0 or outcome.error, outcome
    return found


def may_be_dead(case: Case) -> bool:
    if case.step == "gone" and case.fault == "other copy killed":
        return True  # It may have begun to run.
    if case.fault == "receiver out of memory":
        return case.step == "greeted"  # What is built is in the group, too.
    return case.fault == "program killed"


def loses_pages(case: Case, outcome: Outcome) -> bool:
    """The copy at the source was killed with pages that the running one lacks: nobody can help that."""
    if case.fault not in ("program killed", "other copy killed") or outcome.error is None:
        return False
    return "killed before its last pages" in outcome.error["line"]


def nobody_after_all(scene: Scene, outcome: Outcome) -> str:
    """See that the loss was told, and that ending the program as advised leaves nothing behind."""
    assert outcome.survivor == "destination"
    scene.counter.check_log()
    for pid in scene.counter.copies():
        bell.end(pid)
    tools.until(lambda: not scene.counter.copies(), "it has ended")
    scene.pair.destination.recover()
    return NOBODY


def nothing_else_is_left(scene: Scene) -> None:
    copies = scene.counter.copies()

    def strange_pods() -> dict[int, list[int]]:
        return {init: children(init) for init in scene.pods() if not set(children(init)) & set(copies)}

    tools.until(lambda: not strange_pods(), f"no pod is left but the program's: {strange_pods()}", 5)
    allowed = {*copies, *scene.pods(), scene.server.process.pid}

    def strays() -> dict[int, str]:
        return tools.session_strays(allowed)

    tools.until(lambda: not strays(), f"no process is left: {strays()}", 5)
    assert scene.pair.source.records() == []
    assert scene.pair.destination.undecided() == []
    for machine in (scene.pair.source, scene.pair.destination):
        names = [path.name for path in machine.journal.iterdir()] if machine.journal.exists() else []
        assert [name for name in names if not name.endswith(".json")] == []
    for init in scene.pods():
        links = [link.readlink() for link in Path(f"/proc/{init}/fd").iterdir()]
        assert not [link for link in links if "userfaultfd" in str(link)], f"init {init} holds {links}"


def machines(pair: Pair, directory: Path) -> Pair:
    """Return the same two machines without a past."""
    made = []
    for known in (pair.source, pair.destination):
        place = directory / known.directory.name
        place.mkdir()
        (place / "certs").symlink_to(known.directory / "certs")
        made.append(dataclasses.replace(known, directory=place))
    return Pair(*made)
