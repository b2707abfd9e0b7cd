"""Who a process is and what it may do, kept over its turning into a deputy: capabilities(7), setresuid(2).

execve(2) gives root all capabilities and others none, and makes the saved ids the effective ones. So
capabilities are made ambient before it where they would be lost, and afterwards everything is set as it was.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from typing import Final

from godwit.procfs import status
from godwit.procfs.status import TaskStatus
from godwit.types import Pid

Call = Callable[..., object]
"""Makes a system call in the process: name and arguments, bytes by address. Raises OSError."""

_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2


def before_exec(pid: Pid, call: Call) -> TaskStatus:
    """Prepare a process for an execve(2) that is to cost it nothing; return how it was."""
    before = status.read(pid)
    if before.cap_prm and 0 not in before.uids[:2]:
        # A process may inherit and make ambient whatever it is permitted, without asking anybody.
        inheritable = before.cap_inh | before.cap_prm & before.cap_bnd
        _set_capabilities(call, before.cap_eff, before.cap_prm, inheritable)
        _make_ambient(call, before.cap_prm & inheritable)
    return before


def after_exec(pid: Pid, before: TaskStatus, call: Call) -> None:
    """Give it back the ids and capabilities it had. What nobody but root could give back, it has lost."""
    now = status.read(pid)
    if _same(before, now):
        return
    if now.cap_eff != now.cap_prm:
        _set_capabilities(call, now.cap_prm, now.cap_prm, now.cap_inh)
    _restore_ids(call, "setresuid", "setfsuid", before.uids, now.uids)
    _restore_ids(call, "setresgid", "setfsgid", before.gids, now.gids)
    permitted = before.cap_prm & status.read(pid).cap_prm
    inheritable = before.cap_inh & (now.cap_inh | permitted)
    # Ambient capabilities that are not inheritable any more are gone with it.
    _set_capabilities(call, before.cap_eff & permitted, permitted, inheritable)
    _make_ambient(call, before.cap_amb & permitted & inheritable)


def _same(before: TaskStatus, now: TaskStatus) -> bool:
    names = ("uids", "gids", "cap_inh", "cap_prm", "cap_eff", "cap_amb")
    return all(getattr(before, name) == getattr(now, name) for name in names)


def _restore_ids(
    call: Call,
    three: str,
    fourth: str,
    before: tuple[int, int, int, int],
    now: tuple[int, int, int, int],
) -> None:
    if before == now:
        return
    try:
        call(three, *before[:3])
    except PermissionError:
        return
    if before[3] != before[1]:
        call(fourth, before[3])


def _set_capabilities(call: Call, effective: int, permitted: int, inheritable: int) -> None:
    header = struct.pack("<Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    words = (
        *(effective & 0xFFFFFFFF, permitted & 0xFFFFFFFF, inheritable & 0xFFFFFFFF),
        *(effective >> 32, permitted >> 32, inheritable >> 32),
    )
    call("capset", header, struct.pack("<6I", *words))


def _make_ambient(call: Call, capabilities: int) -> None:
    with contextlib.suppress(PermissionError):  # SECBIT_NO_CAP_AMBIENT_RAISE
        for number in _numbers(capabilities):
            call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0)


def _numbers(capabilities: int) -> Iterator[int]:
    return (number for number in range(64) if capabilities >> number & 1)
