"""Identity, signals and capabilities of a task: /proc/PID/status, proc_pid_status(5)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from godwit.procfs import source, stat
from godwit.types import Pid, Tid


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """What status tells. Signal sets have bit `signal - 1`; capability sets have bit `capability`.

    Without the prefix `ns`, pids are in the pid namespace of the /proc that was read. A zombie has
    no memory and no umask: those are 0.
    """

    name: str
    umask: int
    state: str  # one letter
    tgid: Pid
    pid: int  # a tid, when read from a thread's directory
    ppid: Pid
    tracer_pid: int  # 0: not traced
    uids: tuple[int, int, int, int]  # real, effective, saved, file system
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    nstgid: tuple[int, ...]  # from the reader's pid namespace inwards
    nspid: tuple[int, ...]
    nspgid: tuple[int, ...]
    nssid: tuple[int, ...]
    kthread: bool
    threads: int
    vm_size_bytes: int  # 0: it has given up its memory
    vm_rss_bytes: int
    vm_lck_bytes: int
    thp_enabled: bool  # False: prctl(PR_SET_THP_DISABLE)
    sig_queued: int  # of the real user, not of the process
    sig_pnd: int  # for this thread
    shd_pnd: int  # for the whole process
    sig_blk: int
    sig_ign: int
    sig_cgt: int
    cap_inh: int
    cap_prm: int
    cap_eff: int
    cap_bnd: int
    cap_amb: int
    no_new_privs: bool
    seccomp: int  # 0 off, 1 strict, 2 filter
    seccomp_filters: int
    cpus_allowed: frozenset[int]


class _Fields:
    """The lines of status by key, with errors that name the key."""

    def __init__(self, text: str) -> None:
        self._values: dict[str, str] = {}
        for line in source.lines(text):
            key, colon, value = line.partition(":")
            if not colon:
                raise source.malformed("status", "no colon", line)
            self._values.setdefault(key, value)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        value = self._values.get(key, default)
        if value is None:
            raise source.malformed("status", "missing", key)
        return value

    def number(self, key: str, base: int = 10, default: str | None = None) -> int:
        return source.number("status", key, self.text(key, default), base)

    def numbers(self, key: str, default: str | None = None) -> tuple[int, ...]:
        return tuple(source.number("status", key, word) for word in self.text(key, default).split())

    def ids(self, key: str) -> tuple[int, int, int, int]:
        found = self.numbers(key)
        if len(found) != 4:
            raise source.malformed("status", f"{key} has {len(found)} ids, not 4", self.text(key))
        return found[0], found[1], found[2], found[3]

    def size_bytes(self, key: str) -> int:
        words = self.text(key, "0 kB").split()
        if len(words) != 2 or words[1] != "kB":
            raise source.malformed("status", f"{key} is not in kB", self.text(key))
        return source.number("status", key, words[0]) * 1024


_HIGHEST_CPU = 1 << 16  # far above any CONFIG_NR_CPUS: a larger one is no CPU list


def _parse_cpu_list(text: str) -> frozenset[int]:
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        start = source.number("status", "Cpus_allowed_list", first)
        end = source.number("status", "Cpus_allowed_list", last) if dash else start
        if not 0 <= start <= end < _HIGHEST_CPU:
            raise source.malformed("status", "Cpus_allowed_list is out of order", text)
        cpus.update(range(start, end + 1))
    return frozenset(cpus)


def parse(text: str, *, flags: int = 0) -> TaskStatus:
    """Read the whole file.

    Args:
        text: Of a process or a thread.
        flags: From stat: kernels before 6.9 have no `Kthread` line.

    Raises:
        ValueError: A line is missing or damaged.
    """
    fields = _Fields(text)
    state = fields.text("State").strip()[:1]
    if not state:
        raise source.malformed("status", "State is empty", text)
    pid = fields.text("Pid")
    kthread = fields.number("Kthread") != 0 if "Kthread" in fields else bool(flags & stat.PF_KTHREAD)
    return TaskStatus(
        name=source.unescape_comm(fields.text("Name").removeprefix("\t")),
        umask=fields.number("Umask", 8, "0"),
        state=state,
        tgid=Pid(fields.number("Tgid")),
        pid=fields.number("Pid"),
        ppid=Pid(fields.number("PPid")),
        tracer_pid=fields.number("TracerPid"),
        uids=fields.ids("Uid"),
        gids=fields.ids("Gid"),
        groups=fields.numbers("Groups"),
        # A kernel without pid namespaces has no such lines, and one number for each.
        nstgid=fields.numbers("NStgid", fields.text("Tgid")),
        nspid=fields.numbers("NSpid", pid),
        nspgid=fields.numbers("NSpgid", ""),
        nssid=fields.numbers("NSsid", ""),
        kthread=kthread,
        threads=fields.number("Threads"),
        vm_size_bytes=fields.size_bytes("VmSize"),
        vm_rss_bytes=fields.size_bytes("VmRSS"),
        vm_lck_bytes=fields.size_bytes("VmLck"),
        thp_enabled=fields.number("THP_enabled", default="1") != 0,
        sig_queued=source.number("status", "SigQ", fields.text("SigQ").partition("/")[0]),
        **_signals_and_capabilities(fields),
        no_new_privs=fields.number("NoNewPrivs", default="0") != 0,
        seccomp=fields.number("Seccomp", default="0"),
        seccomp_filters=fields.number("Seccomp_filters", default="0"),
        cpus_allowed=_parse_cpu_list(fields.text("Cpus_allowed_list")),
    )


def _signals_and_capabilities(fields: _Fields) -> Mapping[str, int]:
    keys = {
        "sig_pnd": "SigPnd",
        "shd_pnd": "ShdPnd",
        "sig_blk": "SigBlk",
        "sig_ign": "SigIgn",
        "sig_cgt": "SigCgt",
        "cap_inh": "CapInh",
        "cap_prm": "CapPrm",
        "cap_eff": "CapEff",
        "cap_bnd": "CapBnd",
        "cap_amb": "CapAmb",
    }
    return {name: fields.number(key, 16) for name, key in keys.items()}


def read(pid: Pid, tid: Tid | None = None, *, proc: str = source.PROC) -> TaskStatus:
    """Read status of a process, or of one thread. Raises ProcessLookupError if it is gone."""
    text = source.read_text(pid, "status", tid=tid, proc=proc)
    flags = 0 if "\nKthread:" in text else stat.read(pid, tid, proc=proc).flags
    return parse(text, flags=flags)


_STANDING = re.compile(rb"^(?:Uid|Gid|Groups|Cap\w+|NoNewPrivs|Seccomp|Seccomp_filters):.*$", re.MULTILINE)


def read_standing(pid: Pid, tid: Tid, *, proc: str = source.PROC) -> tuple[bytes, ...]:
    """Return the lines that say who a thread is and what it may do, to be compared with another's.

    Raises ProcessLookupError if it is gone.
    """
    return tuple(_STANDING.findall(source.read_bytes(pid, "status", tid=tid, proc=proc)))


_CAUGHT_OR_WAITING = re.compile(rb"^(?:SigPnd|ShdPnd|SigCgt):\t([0-9a-f]+)$", re.MULTILINE)


def read_signals(pid: Pid, tid: Tid, *, proc: str = source.PROC) -> int:
    """Return the set of signals that a thread catches or that wait for it. Raises as `read` does."""
    found = 0
    for digits in _CAUGHT_OR_WAITING.findall(source.read_bytes(pid, "status", tid=tid, proc=proc)):
        found |= int(digits, 16)
    return found


_NSPID = re.compile(rb"^NSpid:(?:\t\d+)*\t(\d+)$", re.MULTILINE)


def read_inner(pid: Pid, tid: Tid, *, proc: str = source.PROC) -> int:
    """Return a thread's id in its own pid namespace. Raises ProcessLookupError if it is gone."""
    found = _NSPID.search(source.read_bytes(pid, "status", tid=tid, proc=proc))
    return int(found[1]) if found else int(tid)
