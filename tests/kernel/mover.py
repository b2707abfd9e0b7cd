"""Both ends of a move as processes that a test can kill.

The first word says what to do: `serve`, `migrate PID HOST`, `recover`, `restore DIR` and others.

What came of it is one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from godwit import api
from godwit.errors import GodwitError, MigrationError
from godwit.linux import abi
from godwit.migrate import faults, source, transport
from godwit.migrate.channel import Channel
from godwit.migrate.convergence import Strategy
from godwit.migrate.options import Options
from godwit.migrate.report import silent
from godwit.types import Pid
from godwit.wire.frames import FrameKind
from tests.kernel import bell


class _Line(Channel):
    """A channel that ends at one frame: before it has been sent, or after."""

    kind = FrameKind.GO
    after = False
    act: Callable[[], None] = staticmethod(lambda: None)

    def send(self, kind: FrameKind, *parts: bytes | bytearray | memoryview) -> None:
        if kind is not self.kind:
            super().send(kind, *parts)
            return
        if self.after:
            super().send(kind, *parts)
        self.act()
        self.close()
        if not self.after:
            raise ConnectionResetError("the line was cut")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _describe(error: GodwitError) -> dict[str, str | int]:
    return {
        "class": type(error).__name__,
        "status": error.exit_status,
        "line": error.line(),
        "survivor": error.survivor.value if isinstance(error, MigrationError) else "",
    }


def _connector(host: str, words: list[str]) -> Callable[[], Channel]:
    """Connect as always; with `cut FRAME before|after`, the first line ends there."""
    made = []

    def connect() -> Channel:
        channel = transport.connect(host, None)
        made.append(channel)
        if words[:1] in (["cut"], ["crash"]) and len(made) == 1:
            line = _Line(channel._pipe)
            line.kind, line.after = FrameKind[words[1]], words[2] == "after"
            if words[0] == "crash":
                line.act = lambda: _crash_both(int(words[3]))
            return line
        return channel

    return connect


def _crash_both(server: int) -> None:
    """Kill everything that works for the destination, then all of ours: the power fails."""
    for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split():
        os.killpg(int(pid), signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def _die_in_group(where: str) -> None:
    def at(role: str, step: str) -> None:
        if (role, step) == ("source", where):
            os.killpg(0, signal.SIGKILL)

    faults.at = at


def _options() -> Options:
    limit = os.environ.get("GODWIT_TEST_BANDWIDTH")
    return Options(
        strategy=Strategy(os.environ.get("GODWIT_TEST_STRATEGY", "auto")),
        bandwidth_bytes_per_s=float(limit) if limit else None,
    )


def _migrate(pid: str, host: str, *words: str) -> int:
    if words[:1] == ("group",):
        _die_in_group(words[1])
    try:
        report = source.migrate(
            Pid(int(pid)),
            host,
            _connector(host, list(words)),
            _options(),
            progress=silent,
        )
    except GodwitError as error:
        _say(json.dumps({"error": _describe(error)}))
        return error.exit_status
    _say(json.dumps({"report": dataclasses.asdict(report)}))
    return 0


def _serve() -> int:
    certs = Path(os.environ["GODWIT_CERTS"])
    api.serve_tls("127.0.0.1:0", certs, ready=_say)
    return 0


def _restore(directory: str) -> int:
    try:
        api.restore(Path(directory), pod=True)
    except GodwitError as error:
        _say(json.dumps({"error": _describe(error)}))
        return error.exit_status
    return 0


def _checkpoint(pid: str, directory: str, *words: str) -> int:
    error = _checkpoint_error(int(pid), Path(directory), leave_running=words == ("leave-running",))
    if error is None:
        return 0
    _say(json.dumps({"error": _describe(error)}))
    return error.exit_status


def _checkpoint_error(pid: int, directory: Path, *, leave_running: bool) -> GodwitError | None:
    try:
        api.checkpoint(pid, directory, leave_running=leave_running)
    except GodwitError as error:
        return error
    return None


def _tiny(place: str, pid: str, directory: str, *words: str) -> int:
    """Checkpoint into 64 KiB of space. Must be started in a mount namespace of its own."""
    abi.syscall("mount", b"none\0", os.fsencode(place) + b"\0", b"tmpfs\0", 0, b"size=64k\0")
    error = _checkpoint_error(int(pid), Path(directory), leave_running=words == ("leave-running",))
    if error is None:
        return 0
    left = sorted(str(path) for path in Path(place).rglob("*"))
    _say(json.dumps({"error": _describe(error), "left": left}))
    return error.exit_status


def _recover() -> int:
    _say(json.dumps([dataclasses.asdict(each) for each in api.recover()]))
    return 0


if __name__ == "__main__":
    bell.install()
    verbs: dict[str, Callable[..., int]] = {
        "serve": _serve,
        "migrate": _migrate,
        "recover": _recover,
        "restore": _restore,
        "checkpoint": _checkpoint,
        "tiny": _tiny,
    }
    sys.exit(verbs[sys.argv[1]](*sys.argv[2:]))
