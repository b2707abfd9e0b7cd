"""A laboratory in the caller's hands: `with Lab.up(["a", "b"]) as lab: lab.node("a").run(["hostname"])`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from godwit.errors import BusyError, DestinationError, GodwitError, NoProcessError, RequestError
from godwit.lab import enter, fabric, plan, state
from godwit.lab.enter import Command, NodeProcess, Stream
from godwit.linux import pidfd
from godwit.procfs import stat
from godwit.types import OwnedFd, Pid

DEFAULT_NAME = "lab"
_END_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """What `godwit lab status` says of a node."""

    name: str
    address: str
    port: int
    init_pid: int  # as the host sees it
    alive: bool
    connected: bool  # its link is switched on
    processes: int  # beside its init


@dataclass(frozen=True, slots=True, kw_only=True)
class LabStatus:
    """What `godwit lab status` says of a laboratory."""

    name: str
    supervisor_pid: int
    shared: str  # as the host sees it
    bits_per_s: int | None
    delay_ns: int | None
    nodes: tuple[NodeStatus, ...]


class Node:
    """A machine of a running laboratory."""

    def __init__(self, record: state.NodeRecord) -> None:
        self.record = record

    @property
    def name(self) -> str:
        """Its host name."""
        return self.record.name

    @property
    def address(self) -> str:
        """Its IPv4 address, inside the laboratory."""
        return self.record.address

    @property
    def init_pid(self) -> Pid:
        """Its process 1, as the host sees it."""
        return self.record.init.pid

    def alive(self) -> bool:
        """Tell whether it has not been killed."""
        return self.record.init.alive()

    def path(self, inside: str | Path) -> Path:
        """Return the host's path to a file of the node."""
        return Path(f"/proc/{self.init_pid}/root") / str(inside).lstrip("/")

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: Stream | IO[bytes] = None,
        stdout: Stream | IO[bytes] = None,
        stderr: Stream | IO[bytes] = None,
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
    ) -> NodeProcess:
        """Start a program that belongs to the node and return at once.

        Args:
            argv: The program, sought in PATH, and its arguments.
            stdin: A path in the node, an open file or descriptor of ours, None for /dev/null.
            stdout: The same; a path is appended to.
            stderr: The same.
            cwd: A directory in the node.
            env: Its whole environment; None is ours.

        Raises:
            OSError: The program cannot be executed there.
            DestinationError: The node is down.
        """
        command = Command(
            argv=tuple(argv),
            cwd=cwd,
            env=env,
            stdin=_stream(stdin),
            stdout=_stream(stdout),
            stderr=_stream(stderr),
        )
        return enter.start_detached(self.record, command)

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program in the node to its end and return its output and exit status.

        Raises:
            OSError: The program cannot be executed there.
            DestinationError: The node is down.
            subprocess.TimeoutExpired: It took too long, and was killed.
        """
        return enter.run(self.record, Command(argv=tuple(argv), cwd=cwd, env=env), timeout_s)

    def pid_alive(self, node_pid: int) -> bool:
        """Tell whether the node has a process of that number (its own numbering) that is no zombie."""
        try:
            seen = stat.parse(self.path(f"proc/{node_pid}/stat").read_text(errors="surrogateescape"))
        except (FileNotFoundError, ProcessLookupError):
            return False
        return seen.state not in "ZX"

    def pids(self) -> list[int]:
        """List the node's processes, its own numbering, without its init. Empty when it is down."""
        try:
            names = os.listdir(self.path("proc"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return []
        return sorted(int(name) for name in names if name.isdecimal() and name != "1")

    def crash(self) -> None:
        """Kill the whole machine at once, as if its power were cut. It does not come back."""
        held = self.record.init.hold()
        if held is not None:
            with held:
                _end(held, signal.SIGKILL)


class Lab:
    """A running laboratory. `with` takes it down at the end; without, it stays up until `down`."""

    def __init__(self, record: state.LabRecord) -> None:
        self.record = record

    @classmethod
    def up(
        cls,
        names: Sequence[str],
        *,
        name: str = DEFAULT_NAME,
        shared: str | Path | None = None,
        bandwidth: str | None = None,
        delay: str | None = None,
        service: str = plan.SERVICE,
    ) -> Self:
        """Start a laboratory and return when all of it answers.

        Args:
            names: The nodes' host names.
            name: The laboratory's.
            shared: A directory of the host to be /shared in every node; None makes a new one.
            bandwidth: Of each node's link and direction, as `1gbit`.
            delay: Of each node's link and direction, as `5ms`.
            service: What answers the migration port, as `module:function`.

        Raises:
            RequestError: A name, a directory or a number is wrong, or the kernel lacks something.
            BusyError: A laboratory of that name is up.
            DestinationError: It could not be built.
        """
        if os.geteuid() != 0:
            raise RequestError("a lab needs root", remedy="run it with sudo")
        directory = None if shared is None else str(Path(shared).resolve())
        if directory is not None and not Path(directory).is_dir():
            raise RequestError(f"{shared} is no directory", remedy="make it, or leave --shared out")
        wanted = plan.plan_lab(
            names, lab=name, shared=directory, bandwidth=bandwidth, delay=delay, service=service
        )
        state.claim(name)
        try:
            _start_supervisor(wanted)
        except BaseException:
            state.remove(name)
            raise
        return cls.find(name)

    @classmethod
    def find(cls, name: str = DEFAULT_NAME) -> Self:
        """Return a running laboratory. Raises NoProcessError when there is none of that name."""
        record = state.read(name)
        if record is None:
            raise NoProcessError(f"lab {name!r} is not up", remedy=f"godwit lab up a b c --name {name}")
        if not record.nodes:
            raise BusyError(f"lab {name!r} is still starting", remedy="try again in a second")
        return cls(record)

    @property
    def name(self) -> str:
        """The laboratory's name."""
        return self.record.name

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All machines, in the order they were named."""
        return tuple(Node(record) for record in self.record.nodes)

    @property
    def shared(self) -> Path:
        """The host's path to what is /shared in every node."""
        if self.record.shared is not None:
            return Path(self.record.shared)
        return Path(f"/proc/{self.record.owner.pid}/root{self.record.directory}/fs/shared")

    @property
    def certs(self) -> Path:
        """The directory of the host's own certificate for talking to nodes."""
        return self.record.directory / "certs"

    def node(self, name: str) -> Node:
        """Return the machine called `name`. Raises RequestError."""
        return Node(self.record.node(name))

    def partition(self, name: str) -> None:
        """Cut a node off the network, from one moment to the next."""
        fabric.set_port(self.record.owner.pid, self._position(name), up=False)

    def heal(self, name: str) -> None:
        """Join a node that was cut off to the network again."""
        fabric.set_port(self.record.owner.pid, self._position(name), up=True)

    def status(self) -> LabStatus:
        """Look at everything now."""
        ports = fabric.ports_up(self.record.owner.pid, len(self.record.nodes))
        nodes = tuple(
            NodeStatus(
                name=node.name,
                address=node.address,
                port=node.record.port,
                init_pid=node.init_pid,
                alive=node.alive(),
                connected=up,
                processes=len(node.pids()),
            )
            for node, up in zip(self.nodes, ports, strict=True)
        )
        return LabStatus(
            name=self.name,
            supervisor_pid=self.record.owner.pid,
            shared=str(self.shared),
            bits_per_s=self.record.bits_per_s,
            delay_ns=self.record.delay_ns,
            nodes=nodes,
        )

    def down(self) -> None:
        """Kill every program in every node and remove the laboratory. Down already: nothing happens."""
        held = self.record.owner.hold()
        ended = True
        if held is not None:
            with held:
                ended = _end(held, signal.SIGTERM)
        # A supervisor that ended by itself has removed its directory; else reading does.
        state.read(self.name)
        if not ended:
            raise GodwitError(f"the supervisor of lab {self.name} did not end and was killed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    def _position(self, name: str) -> int:
        return self.record.nodes.index(self.record.node(name))


def all_labs() -> list[Lab]:
    """Return every laboratory that is up."""
    return [Lab(record) for record in state.living() if record.nodes]


def _stream(given: Stream | IO[bytes]) -> Stream:
    return given if isinstance(given, int | str | None) else given.fileno()


def _start_supervisor(wanted: plan.LabPlan) -> None:
    from godwit.lab.supervisor import Verdict

    source = str(Path(__file__).resolve().parents[2])
    search = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    log_path = state.LABS / wanted.name / "log"
    with log_path.open("w+b") as log:
        # The first process hands over to the resident one and ends, so `run` returns only when the
        # verdict has been said or can no more be.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "godwit.lab.supervisor"],
            input=msgspec.json.encode(wanted),
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            cwd="/",
            check=False,
        )
        log.seek(0)
        last_words = log.read().decode(errors="replace").strip().rpartition("\n")[2]
    if not done.stdout:
        raise DestinationError(f"the supervisor of lab {wanted.name!r} died: {last_words}")
    verdict = msgspec.json.decode(done.stdout, type=Verdict)
    if not verdict.error:
        return
    if verdict.exit_status == RequestError.exit_status:
        raise RequestError(verdict.error, remedy=verdict.remedy)
    raise DestinationError(f"{verdict.error} ({last_words})", remedy=verdict.remedy)


def _end(held: OwnedFd, number: int) -> bool:
    """Signal a process and wait for its end; if it takes too long, kill it and return False."""
    poller = select.poll()
    poller.register(held, select.POLLIN)
    for each in (number, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            pidfd.send_signal(held.number, each)
        if poller.poll(_END_TIMEOUT_S * 1000):
            return each == number
    return False
