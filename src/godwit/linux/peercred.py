"""Who a connected unix socket says is at its other end: SO_PEERCRED in unix(7)."""

from __future__ import annotations

import os
import socket
import struct
import threading

from godwit.linux import abi

_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_KEEP = -1
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4


def peer_ids(sock: socket.socket) -> tuple[int, int]:
    """Return the effective user and group id of who connected the other end."""
    _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return uid, gid


def socketpair_as(uid: int, gid: int, kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """Make a pair whose ends say that `uid` and `gid` made them; the process id is ours.

    Raises:
        PermissionError: We may not take these ids.
        OSError: EINVAL, an id is not known in our user namespace.
    """
    if (uid, gid) == (os.geteuid(), os.getegid()):
        return socket.socketpair(socket.AF_UNIX, kind)
    made: list[tuple[socket.socket, socket.socket]] = []
    errors: list[OSError] = []

    def body() -> None:
        try:
            # The system calls, not the C library's: they change this thread alone, which ends here.
            abi.syscall("setresgid", _KEEP, gid, _KEEP)
            abi.syscall("setresuid", _KEEP, uid, _KEEP)
            made.append(socket.socketpair(socket.AF_UNIX, kind))
        except OSError as error:
            errors.append(error)

    dumpable = abi.syscall("prctl", PR_GET_DUMPABLE, 0, 0, 0, 0)
    thread = threading.Thread(target=body, name="socketpair")
    thread.start()
    thread.join()
    # Changed ids forbid others to trace the whole process, though only the thread's did change.
    abi.syscall("prctl", PR_SET_DUMPABLE, dumpable, 0, 0, 0)
    if errors:
        raise errors[0]
    return made[0]
