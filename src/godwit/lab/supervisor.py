"""The one resident process of a laboratory: `python -m godwit.lab.supervisor`.

It reads the plan from standard input, builds the nodes, says on standard output how that went, and
stays. Everything hangs on it and on it alone: the mounts are in its mount namespace, the bridge is
in its network namespace, the nodes' first processes are its children and die with it. So however
it ends, nothing is left but its directory in /run/godwit/labs.

It also answers the migration port of each node, inside the node.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import msgspec

from godwit.errors import GodwitError
from godwit.lab import machine, state, switch
from godwit.lab.fabric import Fabric
from godwit.lab.plan import NODE_RUN, PORT, LabPlan
from godwit.linux import mount, ns, rtnetlink
from godwit.migrate import certs
from godwit.types import Pid

BACKLOG = 64

Serve = Callable[[socket.socket, Path], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the supervisor says when it is up, or why it is not."""

    error: str = ""
    remedy: str = ""
    exit_status: int = 0


@dataclass(slots=True, kw_only=True)
class _Machine:
    """A node under the supervisor's hands."""

    name: str
    init: Pid
    pidfd: int
    status: socket.socket
    listener: socket.socket | None = None


@dataclass(slots=True, kw_only=True)
class _Crew:
    """The supervisor's children that stay, as far as they have been made."""

    machines: list[_Machine] = field(default_factory=list[_Machine])
    switch_pidfd: int | None = None


def main() -> int:
    """Detach, build, report, serve until told to end."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=LabPlan)
    if os.fork():
        # Whoever asked waits for this one; the laboratory is nobody's child.
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    crew = _Crew()
    try:
        _build(plan, crew)
        verdict = Verdict()
    except GodwitError as error:
        verdict = Verdict(error=error.message, remedy=error.remedy, exit_status=error.exit_status)
    except OSError as error:
        traceback.print_exc()
        notes = " ".join(getattr(error, "__notes__", []))
        verdict = Verdict(error=f"cannot build the lab: {error} {notes}".rstrip(), exit_status=7)
    heard = _report(verdict)
    if heard and not verdict.error:
        _serve(plan, crew.machines)
    _end(plan, crew)
    return 0


def _build(plan: LabPlan, crew: _Crew) -> None:
    machines = crew.machines
    ns.unshare(ns.CLONE_NEWNS | ns.CLONE_NEWNET)
    mount.make_private()
    storage = state.LABS / plan.name / "fs"
    storage.mkdir()
    mount.mount("godwit-lab", storage, "tmpfs", mount.MS_NODEV, "mode=755")
    (storage / "shared").mkdir(mode=0o777)
    (storage / "shared").chmod(0o1777)
    machines.extend(_fork_node(plan, position, storage) for position in range(len(plan.nodes)))
    # The nodes mount while the keys are made.
    identities = _identities(plan)
    with rtnetlink.Route() as route:
        fabric = Fabric(route, plan)
        for position, each in enumerate(machines):
            _hear(each, machine.UNSHARED)
            each.listener = fabric.plug(position, each.init)
            each.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.listener.bind(("", PORT))
            each.listener.listen(BACKLOG)
            each.listener.setblocking(False)
    if plan.delay_ns:
        crew.switch_pidfd = _fork_switch(fabric, plan.delay_ns)
    for each, identity in zip(machines, identities, strict=True):
        _hear(each, machine.BUILT)
        identity.write(Path(f"/proc/{each.init}/root{NODE_RUN}/certs"))
        each.status.sendall(machine.GO)
        each.status.close()
    state.write(_record(plan, machines))


def _identities(plan: LabPlan) -> list[certs.Identity]:
    authority = certs.make_authority(f"lab {plan.name}")
    authority.issue("host", []).write(state.LABS / plan.name / "certs")
    return [authority.issue(node.name, [node.address]) for node in plan.nodes]


def _fork_node(plan: LabPlan, position: int, storage: Path) -> _Machine:
    node = plan.nodes[position]
    own = storage / node.name
    own.mkdir()
    ours, theirs = socket.socketpair()
    pid = ns.fork_with_pid_namespace(lambda: ns.unshare(ns.CLONE_NEWPID))
    if pid == 0:
        _in_child(lambda: machine.become_node(plan, node, own, theirs))
    theirs.close()
    return _Machine(name=node.name, init=Pid(pid), pidfd=os.pidfd_open(pid), status=ours)


def _fork_switch(fabric: Fabric, delay_ns: int) -> int:
    """Start the switch, and return its pidfd."""
    pid = os.fork()
    if pid == 0:
        _in_child(lambda: _become_switch(fabric, delay_ns))
    for tap in fabric.taps:
        tap.close()
    return os.pidfd_open(pid)


def _become_switch(fabric: Fabric, delay_ns: int) -> NoReturn:
    ns.die_with_parent()
    _quiet()
    _keep_only(tap.number for tap in fabric.taps)
    switch.run(fabric.taps, delay_ns)


def _hear(each: _Machine, expected: bytes) -> None:
    if each.status.recv(1) != expected:
        raise OSError(f"node {each.name} could not be built, see the log above")


def _record(plan: LabPlan, machines: list[_Machine]) -> state.LabRecord:
    return state.LabRecord(
        name=plan.name,
        owner=state.ProcessRecord.of(Pid(os.getpid())),
        nodes=tuple(
            state.NodeRecord(
                name=node.name, address=node.address, port=PORT, init=state.ProcessRecord.of(each.init)
            )
            for node, each in zip(plan.nodes, machines, strict=True)
        ),
        shared=plan.shared,
        bits_per_s=plan.bits_per_s,
        delay_ns=plan.delay_ns,
    )


def _report(verdict: Verdict) -> bool:
    """Tell whoever asked; return whether they were still there to hear it."""
    try:
        os.write(1, msgspec.json.encode(verdict) + b"\n")
    except BrokenPipeError:
        return False
    _quiet()
    return True


def _quiet() -> None:
    """Let go of standard input and output, which whoever asked waits for."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _keep_only(fds: Iterable[int]) -> None:
    """Close every descriptor but these and the standard three."""
    low = 3
    for fd in sorted(fds):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _load_service(name: str) -> Serve | None:
    module, _, function = name.partition(":")
    try:
        serve: Serve = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):
        traceback.print_exc()
        return None
    # What is loaded now is shared with every child; keep the collector from writing to it.
    gc.freeze()
    return serve


def _serve(plan: LabPlan, machines: list[_Machine]) -> None:
    """Answer connections and bury children until SIGTERM or SIGINT."""
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, _note)
    # Before this line an early death of a node made a zombie and no signal.
    serve = _load_service(plan.service)
    poller = select.poll()
    poller.register(wake_read, select.POLLIN)
    by_fd: dict[int, _Machine] = {}
    for each in machines:
        assert each.listener is not None
        by_fd[each.listener.fileno()] = by_fd[each.pidfd] = each
        poller.register(each.listener, select.POLLIN)
        poller.register(each.pidfd, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == wake_read:
                told = os.read(wake_read, 4096)
                if signal.SIGTERM in told or signal.SIGINT in told:
                    return
                _bury()
                continue
            each = by_fd[fd]
            assert each.listener is not None
            if fd == each.pidfd:  # the node has died
                poller.unregister(each.pidfd)
                poller.unregister(each.listener)
                each.listener.close()
            elif each.listener.fileno() == fd:
                _answer(each, serve)


def _note(number: int, frame: object) -> None:
    """Let the wakeup descriptor tell: a handler must be there, or nothing is written to it."""


def _answer(each: _Machine, serve: Serve | None) -> None:
    """Accept one connection and serve it in a child that lives in the node."""
    assert each.listener is not None
    try:
        connection, _ = each.listener.accept()
    except (BlockingIOError, ConnectionError):
        return
    with connection:
        if serve is None:
            return
        try:
            pid = ns.fork_with_pid_namespace(lambda: ns.setns(each.pidfd, ns.CLONE_NEWPID))
        except OSError:  # the node died a moment ago, or there is no room for a process
            traceback.print_exc()
            return
        if pid == 0:
            _in_child(lambda: _serve_inside(each, serve, connection))


def _serve_inside(each: _Machine, serve: Serve, connection: socket.socket) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    ns.die_with_parent()
    os.setsid()
    ns.setns(each.pidfd, machine.NAMESPACES)
    os.chdir("/")
    connection.setblocking(True)
    _keep_only([connection.fileno()])
    serve(connection, Path(NODE_RUN, "certs"))


def _in_child(work: Callable[[], object]) -> NoReturn:
    """Do `work` and end the process: a child of the supervisor must never go on as a second one."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001  # the last frame of this process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _bury() -> None:
    """Reap every child that has ended."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def _end(plan: LabPlan, crew: _Crew) -> None:
    """Kill the nodes, wait until all in them is gone, and remove the directory."""
    pidfds = [each.pidfd for each in crew.machines]
    if crew.switch_pidfd is not None:
        pidfds.append(crew.switch_pidfd)
    for pidfd in pidfds:
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            continue
    # All children, not the inits alone: an init ends last, after every zombie of its namespace has
    # been reaped, and those that served connections are ours to reap.
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    storage = state.LABS / plan.name / "fs"
    if storage.is_mount():
        mount.umount(storage, mount.MNT_DETACH)
    state.remove(plan.name)


if __name__ == "__main__":
    sys.exit(main())
