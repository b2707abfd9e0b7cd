"""System V message queues and semaphores: who used them. sysvipc(7), semctl(2)."""

from __future__ import annotations

from collections.abc import Iterator

from godwit.linux import abi

_GETPID = 11


def users_of_semaphores() -> Iterator[tuple[int, int]]:
    """Yield (semaphore set, pid that last operated on one of it), in our ipc and pid namespaces."""
    for columns in _rows("sem"):
        semid, count = int(columns[1]), int(columns[3])
        for number in range(count):
            try:
                yield semid, abi.syscall("semctl", semid, number, _GETPID, 0)
            except OSError:
                break


def users_of_queues() -> Iterator[tuple[int, int]]:
    """Yield (message queue, pid that last sent to or received from it), in our ipc and pid namespaces."""
    for columns in _rows("msg"):
        yield from ((int(columns[1]), int(columns[at])) for at in (5, 6))


def _rows(kind: str) -> list[list[str]]:
    try:
        with open(f"/proc/sysvipc/{kind}", encoding="ascii") as file:
            return [line.split() for line in file.readlines()[1:]]
    except FileNotFoundError:
        return []  # A kernel without System V IPC.
