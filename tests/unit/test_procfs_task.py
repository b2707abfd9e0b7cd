"""stat, status, limits, auxv, sched: text of the kernel against what it means."""

from __future__ import annotations

import os
import resource
import struct
from pathlib import Path

import pytest

from godwit.procfs import auxv, cpuinfo, limits, sched, stat, status, timens
from godwit.types import Pid, Tid

STAT_TAIL = (
    "R 4372 4373 2245 34816 4374 4194304 103 0 0 0 7 9 0 0 20 -5 3 0 68705 3133440 413 18446744073709551615 "
    "93916053905408 93916053925289 140733032064896 0 0 0 0 0 0 0 0 0 17 1 50 2 0 0 0 93916053941296 "
    "93916053942912 93916868050944 140733032073738 140733032073776 140733032073777 140733032075243 256\n"
)
STATUS = (
    "Name:\ta) R\\n\\\\(b\tc\nUmask:\t0027\nState:\tS (sleeping)\nTgid:\t70\nNgid:\t0\nPid:\t71\nPPid:\t60\n"
    "TracerPid:\t5\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t256\nGroups:\t10 20 \nNStgid:\t70\t1\n"
    "NSpid:\t71\t2\nNSpgid:\t70\t1\nNSsid:\t50\t0\nKthread:\t0\nVmLck:\t       4 kB\nVmRSS:\t    1764 kB\n"
    "THP_enabled:\t0\nThreads:\t2\nSigQ:\t3/96365\nSigPnd:\t0000000000000001\nShdPnd:\t0000000000000002\n"
    "SigBlk:\t0000000000000004\nSigIgn:\t0000000000001000\nSigCgt:\tffffffff00000000\n"
    "CapInh:\t0000000000000001\nCapPrm:\t000001fffeffffff\nCapEff:\t0000000000000003\n"
    "CapBnd:\t0000000000000007\nCapAmb:\t000000000000000f\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\n"
    "Cpus_allowed:\td\nCpus_allowed_list:\t0,2-3\nvoluntary_ctxt_switches:\t0\n"
)
ME = Pid(os.getpid())


@pytest.mark.parametrize("comm", ["cat", "a) R (b", "", " ) S 1 ", "two\nlines", "back\\slash", "(("])
def test_a_name_of_any_kind_is_told_from_the_fields_after_it(comm: str) -> None:
    found = stat.parse(f"4375 ({comm}) {STAT_TAIL}")
    assert (found.pid, found.comm, found.state, found.ppid) == (4375, comm, "R", 4372)


def test_every_field_of_stat_is_the_one_of_the_manual() -> None:
    found = stat.parse(f"4375 (cat) {STAT_TAIL}")
    assert (found.pgrp, found.session, found.tty_nr, found.tpgid) == (4373, 2245, 34816, 4374)
    assert (found.flags, found.utime, found.stime) == (4194304, 7, 9)
    assert (found.priority, found.nice, found.num_threads) == (20, -5, 3)
    assert (found.starttime, found.vsize) == (68705, 3133440)
    assert (found.start_code, found.end_code, found.start_stack) == (
        93916053905408,
        93916053925289,
        140733032064896,
    )
    assert (found.exit_signal, found.rt_priority, found.policy) == (17, 50, 2)
    assert (found.start_data, found.end_data, found.start_brk) == (
        93916053941296,
        93916053942912,
        93916868050944,
    )
    assert (found.arg_start, found.arg_end) == (140733032073738, 140733032073776)
    assert (found.env_start, found.env_end, found.exit_code) == (140733032073777, 140733032075243, 256)
    assert not found.kernel_thread


def test_a_short_stat_is_refused_with_the_count() -> None:
    with pytest.raises(ValueError, match="stat: 3 fields"):
        stat.parse("1 (cat) R 2 3")


def test_own_stat_agrees_with_os() -> None:
    found = stat.read(ME)
    assert found.pid == os.getpid()
    assert (found.ppid, found.pgrp, found.session) == (os.getppid(), os.getpgrp(), os.getsid(0))
    assert found.comm == Path("/proc/self/comm").read_text(encoding="utf-8")[:-1]
    assert found.nice == os.getpriority(os.PRIO_PROCESS, 0)
    assert found.policy == os.sched_getscheduler(0)


def test_a_task_that_is_gone_is_a_lookup_error() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    with pytest.raises(ProcessLookupError):
        stat.read(Pid(child))
    with pytest.raises(ProcessLookupError):
        status.read(ME, Tid(child))
    with pytest.raises(ProcessLookupError):
        limits.read(Pid(child))


def test_every_line_of_status_is_read() -> None:
    found = status.parse(STATUS)
    assert found.name == "a) R\n\\(b\tc"
    assert (found.umask, found.state) == (0o27, "S")
    assert (found.tgid, found.pid, found.ppid, found.tracer_pid) == (70, 71, 60, 5)
    assert (found.uids, found.gids, found.groups) == ((1, 2, 3, 4), (5, 6, 7, 8), (10, 20))
    assert (found.nstgid, found.nspid, found.nspgid, found.nssid) == ((70, 1), (71, 2), (70, 1), (50, 0))
    assert (found.kthread, found.threads) == (False, 2)
    assert (found.vm_rss_bytes, found.vm_lck_bytes) == (1764 * 1024, 4096)
    assert not found.thp_enabled
    assert (found.sig_queued, found.sig_pnd, found.shd_pnd, found.sig_blk) == (3, 1, 2, 4)
    assert (found.sig_ign, found.sig_cgt) == (0x1000, 0xFFFFFFFF00000000)
    assert (found.cap_inh, found.cap_prm, found.cap_eff) == (1, 0x1FFFEFFFFFF, 3)
    assert (found.cap_bnd, found.cap_amb) == (7, 15)
    assert (found.no_new_privs, found.seccomp, found.seccomp_filters) == (True, 2, 3)
    assert found.cpus_allowed == {0, 2, 3}


def test_status_of_an_older_kernel_takes_kthread_from_the_flags() -> None:
    old = STATUS.replace("Kthread:\t0\n", "")
    assert status.parse(old, flags=stat.PF_KTHREAD).kthread
    assert not status.parse(old).kthread


def test_status_of_a_zombie_has_no_memory() -> None:
    lines = [line for line in STATUS.splitlines(keepends=True) if not line.startswith(("Vm", "Umask"))]
    found = status.parse("".join(lines))
    assert (found.vm_rss_bytes, found.vm_lck_bytes, found.umask) == (0, 0, 0)


@pytest.mark.parametrize("cpus", ["", "3-1", "0-99999999999", "x"])
def test_a_damaged_cpu_list_is_refused(cpus: str) -> None:
    with pytest.raises(ValueError, match="Cpus_allowed_list"):
        status.parse(STATUS.replace("0,2-3", cpus))


def test_a_missing_line_of_status_is_named() -> None:
    with pytest.raises(ValueError, match="SigCgt"):
        status.parse(STATUS.replace("SigCgt", "SigXxx"))


def test_own_status_agrees_with_os() -> None:
    found = status.read(ME)
    assert found.uids[:3] == os.getresuid()
    assert found.gids[:3] == os.getresgid()
    assert sorted(found.groups) == sorted(os.getgroups())
    assert found.cpus_allowed == os.sched_getaffinity(0)
    assert found.nspid[0] == os.getpid()
    assert found.vm_rss_bytes > 0


def test_own_limits_agree_with_getrlimit() -> None:
    found = limits.read(ME)
    assert len(found) == 16
    for name in ("CPU", "STACK", "CORE", "NOFILE", "MEMLOCK", "AS", "SIGPENDING", "RTPRIO"):
        number = getattr(resource, f"RLIMIT_{name}")
        assert found[number] == tuple(value % 2**64 for value in resource.getrlimit(number)), name


def test_an_unknown_limit_is_refused_by_name() -> None:
    text = Path("/proc/self/limits").read_text(encoding="ascii")
    with pytest.raises(ValueError, match="Max new thing"):
        limits.parse(text + f"{'Max new thing':<25} {1:<20} {2:<20} {'units':<10}\n")
    with pytest.raises(ValueError, match="Max open files"):
        limits.parse("".join(line for line in text.splitlines(keepends=True) if "open files" not in line))


def test_own_auxv_tells_the_page_size() -> None:
    assert dict(auxv.read(ME))[6] == os.sysconf("SC_PAGE_SIZE")  # AT_PAGESZ


def test_auxv_ends_at_null_and_nowhere_else() -> None:
    raw = struct.pack("@6L", 6, 4096, 23, 0, 0, 0)
    assert auxv.parse(raw) == ((6, 4096), (23, 0))
    assert auxv.parse(b"") == ()
    with pytest.raises(ValueError, match="no end"):
        auxv.parse(raw[:-16])
    with pytest.raises(ValueError, match="no whole entries"):
        auxv.parse(raw[:-1])


def test_exec_start_is_milliseconds_with_six_decimals() -> None:
    head = "cat (5028, #threads: 1)\n----\n"
    line = "se.exec_start                                :        823364.087418\n"
    assert sched.parse_exec_start_ns(head + line) == 823_364_087_418
    assert sched.parse_exec_start_ns(head) is None


def test_the_runner_itself_waits_in_no_kernel_function() -> None:
    assert sched.wchan(ME, Tid(os.getpid())) == ""


def test_clock_offsets_below_zero_count_upwards() -> None:
    assert timens.parse("monotonic           -2         750000000\nboottime            3         1\n") == (
        -1_250_000_000,
        3_000_000_001,
    )
    with pytest.raises(ValueError, match="a clock is missing"):
        timens.parse("monotonic 0 0\n")


def test_cpu_flags_are_those_every_processor_has() -> None:
    text = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx512f sse2\n"
        "power management:\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2\n"
    )
    found = cpuinfo.parse(text)
    assert found.flags == {"fpu", "sse2"}
    assert (found.vendor, found.model_name) == ("AuthenticAMD", "AMD EPYC")
    assert cpuinfo.read().flags
