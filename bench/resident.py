"""The resident memory of the two ends of a move, looked at while it goes on."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from dataclasses import dataclass, field
from typing import Self

from bench.place import Place

_EVERY_MS = 2


@dataclass(slots=True)
class Watch:
    """Within `with`: notes the highest VmHWM (proc_pid_status(5)) of any Python in each node.

    The peak is the kernel's, so nothing is missed but growth in the last two milliseconds of a
    process.
    """

    place: Place
    peak_kib: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.peak_kib = dict.fromkeys("ab", 0)
        self._stop.clear()
        self._thread = threading.Thread(target=self._look_on)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _look_on(self) -> None:
        namespaces = {
            name: os.readlink(f"/proc/{self.place.lab.node(name).init_pid}/ns/pid") for name in self.peak_kib
        }
        namespace_of: dict[str, str] = {}
        poller = select.poll()
        while not self._stop.is_set():
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    if pid not in namespace_of:
                        namespace_of[pid] = os.readlink(f"/proc/{pid}/ns/pid")
                    for name, namespace in namespaces.items():
                        if namespace_of[pid] == namespace and _is_python(pid):
                            self.peak_kib[name] = max(self.peak_kib[name], _peak_kib(pid))
            poller.poll(_EVERY_MS)


def _is_python(pid: str) -> bool:
    return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))


def _peak_kib(pid: str) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0
