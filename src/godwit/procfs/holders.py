"""Who, beside a tree of processes, has something open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from godwit.procfs import stat, tasks
from godwit.procfs.maps import DELETED
from godwit.types import Fd, Pid

MEMFD = "/memfd:"


def list_nameless(excepted: Collection[Pid]) -> dict[str, tuple[tuple[Pid, Fd], ...]]:
    """List what all processes but the excepted have open, by link; only links that lead to no path."""
    found: dict[str, list[tuple[Pid, Fd]]] = defaultdict(list)
    for pid in tasks.list_pids():
        if pid in excepted:
            continue
        try:
            links = tasks.open_fds(pid)
        except (ProcessLookupError, PermissionError):
            continue
        for fd, link in links.items():
            if not link.startswith("/") or link.startswith(MEMFD) or link.endswith(DELETED):
                found[link].append((pid, fd))
    return {link: tuple(slots) for link, slots in found.items()}


def is_outsider(pid: Pid, tree: Collection[Pid]) -> bool:
    """Tell whether a process lives, and neither is one of the tree nor was born into it."""
    try:
        while pid > 1 and pid not in tree:
            pid = stat.read(pid).ppid
    except ProcessLookupError:
        return False
    return pid not in tree
