"""The open file descriptions of a tree: several descriptors, of several processes, may be of one."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from godwit.linux import kcmp
from godwit.procfs import fdinfo
from godwit.resources.base import OpenFile
from godwit.types import Fd, FileId, Pid

if TYPE_CHECKING:
    from godwit.engine.view import ProcessView


def group(processes: Sequence[ProcessView]) -> tuple[OpenFile, ...]:
    """Group descriptors into open file descriptions: kcmp(2) tells which are one."""
    by_link: dict[str, list[list[tuple[Pid, Fd]]]] = defaultdict(list)
    for process in processes:
        for fd, link in sorted(process.links.items()):
            _place(by_link[link], (process.pid, fd))
    files: list[OpenFile] = []
    for link, groups in by_link.items():
        for group in groups:
            files.append(_open_file(FileId(len(files) + 1), link, tuple(sorted(group))))
    return tuple(files)


def _place(groups: list[list[tuple[Pid, Fd]]], slot: tuple[Pid, Fd]) -> None:
    """Put a slot into its group, or into a new one. kcmp(2) orders files, so groups stay sorted."""
    low, high = 0, len(groups)
    while low < high:
        middle = (low + high) // 2
        order = kcmp.file_order(*slot, *groups[middle][0])
        if order == kcmp.SAME:
            groups[middle].append(slot)
            return
        if order == kcmp.LESS:
            high = middle
        else:
            low = middle + 1
    groups.insert(low, [slot])


def _open_file(file_id: FileId, link: str, holders: tuple[tuple[Pid, Fd], ...]) -> OpenFile:
    pid, fd = holders[0]
    found = os.stat(f"/proc/{pid}/fd/{fd}")
    return OpenFile(
        file_id=file_id,
        holders=holders,
        link=link,
        info=fdinfo.read(pid, fd),
        mode=found.st_mode,
        device=found.st_dev,
        rdevice=found.st_rdev,
        inode=found.st_ino,
        where=f"pid {pid} fd {fd}",
    )
