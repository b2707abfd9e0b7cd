"""Becoming a node: what a fresh child of the supervisor does before it turns into the node's process 1.

Its root is an overlay over the host's root, with whatever the node writes on the laboratory's own
tmpfs. /proc /sys /dev /tmp /run and /dev/shm are new. File systems that the host has mounted below
its root get an overlay each.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from godwit.lab import idle
from godwit.lab.plan import NODE_RUN, PORT, SHARED, LabPlan, NodePlan
from godwit.linux import mount, ns
from godwit.procfs import mountinfo

NAMESPACES = ns.CLONE_NEWNS | ns.CLONE_NEWNET | ns.CLONE_NEWUTS | ns.CLONE_NEWIPC | ns.CLONE_NEWCGROUP
"""What a node has of its own, beside the pid namespace it was forked into."""

UNSHARED = b"U"  # said when the namespaces are there, so that the supervisor can plug in the link
BUILT = b"B"  # said when the root is there
GO = b"G"  # heard when all the rest is done

_NEW_TREES = ("proc", "sys", "dev", "tmp", "run")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "fuse", "userfaultfd", "net/tun")
_DEVICE_LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}
# File systems without a block device that still hold people's files.
_FILE_SYSTEMS = frozenset({"btrfs", "zfs", "overlay", "nfs", "nfs4", "virtiofs", "9p"})
# Names without case cannot be below an overlay.
_NO_LOWER = frozenset({"vfat", "msdos", "exfat", "ntfs3"})


def become_node(plan: LabPlan, node: NodePlan, storage: Path, status: socket.socket) -> NoReturn:
    """Turn the calling process, the first of its pid namespace, into the node. Never returns.

    Args:
        plan: The laboratory.
        node: Which node of it.
        storage: A directory on the laboratory's tmpfs, for this node alone.
        status: Joined to the supervisor. The node ends when the supervisor goes away.
    """
    ns.die_with_parent()
    os.setsid()
    ns.unshare(NAMESPACES)
    status.sendall(UNSHARED)
    socket.sethostname(node.name)
    root = _mount_root(plan, storage)
    _write_files(plan, node, root)
    mount.pivot_to(root)
    init = Path(NODE_RUN, "init")
    init.write_bytes(idle.program())
    init.chmod(0o755)
    status.sendall(BUILT)
    if status.recv(1) != GO:
        os._exit(1)
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.execve(init, ["init"], {})


def _mount_root(plan: LabPlan, storage: Path) -> Path:
    root = storage / "root"
    root.mkdir()
    _overlay(Path("/"), storage / "layer", root)
    for number, path in enumerate(_mounts_of_people()):
        _overlay(path, storage / f"layer{number}", root / path.relative_to("/"))
    for name in (*_NEW_TREES, SHARED[1:]):
        (root / name).mkdir(exist_ok=True)
    mount.mount("proc", root / "proc", "proc", mount.MS_NOSUID | mount.MS_NODEV | mount.MS_NOEXEC)
    mount.mount("sysfs", root / "sys", "sysfs", mount.MS_NOSUID | mount.MS_NODEV | mount.MS_NOEXEC)
    for name, mode in (("tmp", "1777"), ("run", "755")):
        mount.mount(name, root / name, "tmpfs", mount.MS_NOSUID | mount.MS_NODEV, f"mode={mode}")
    _make_devices(root / "dev")
    mount.bind(plan.shared or storage.parent / "shared", root / SHARED[1:])
    for path in _hidden_homes():
        target = root / path.relative_to("/")
        target.mkdir(parents=True, exist_ok=True)
        mount.bind(path, target, read_only=True)
    return root


def _overlay(lower: Path, layer: Path, target: Path) -> None:
    upper, work = layer / "upper", layer / "work"
    upper.mkdir(parents=True)
    work.mkdir()
    options = f"lowerdir={_escaped(lower)},upperdir={_escaped(upper)},workdir={_escaped(work)}"
    mount.mount("overlay", target, "overlay", 0, options)


def _escaped(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _mounts_of_people() -> Sequence[Path]:
    """List what the host has mounted below its root that holds people's files, outer before inner."""
    lines = Path("/proc/filesystems").read_text().splitlines()
    without_device = {line.split("\t")[1] for line in lines if line.startswith("nodev")}
    found: list[Path] = []
    for seen in mountinfo.parse(Path("/proc/self/mountinfo").read_text(errors="surrogateescape")):
        path = Path(seen.mount_point)
        ours = path == Path("/") or path.parts[1] in _NEW_TREES
        foreign = seen.fs_type in without_device and seen.fs_type not in _FILE_SYSTEMS
        if ours or foreign or seen.fs_type in _NO_LOWER:
            continue
        if path.is_dir() and path not in found:
            found.append(path)
    return found


def _hidden_homes() -> Sequence[Path]:
    """List where Python and Godwit live, if that is under a directory which the node has anew."""
    # The parent of the package: a source tree, or the packages of an installation.
    homes = {Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[2]}
    return sorted(home for home in homes if home.parts[1:2] and home.parts[1] in _NEW_TREES)


def _make_devices(dev: Path) -> None:
    mount.mount("dev", dev, "tmpfs", mount.MS_NOSUID, "mode=755")
    for name in _DEVICES:
        host = Path("/dev", name)
        if not host.exists():
            continue
        seen = host.stat()
        (dev / name).parent.mkdir(exist_ok=True)
        os.mknod(dev / name, seen.st_mode, seen.st_rdev)
        (dev / name).chmod(stat.S_IMODE(seen.st_mode))  # whatever our umask is
    for name, target in _DEVICE_LINKS.items():
        (dev / name).symlink_to(target)
    for name in ("pts", "shm", "mqueue"):
        (dev / name).mkdir()
    private = mount.MS_NOSUID | mount.MS_NOEXEC
    # gid 5 is `tty` on every distribution.
    mount.mount("devpts", dev / "pts", "devpts", private, "newinstance,ptmxmode=0666,mode=0620,gid=5")
    mount.mount("shm", dev / "shm", "tmpfs", mount.MS_NOSUID | mount.MS_NODEV, "mode=1777")
    mount.mount("mqueue", dev / "mqueue", "mqueue", private | mount.MS_NODEV)


def _write_files(plan: LabPlan, node: NodePlan, root: Path) -> None:
    hosts = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    hosts += [f"{other.address} {other.name}" for other in plan.nodes]
    _replace(root / "etc/hosts", "\n".join(hosts) + "\n")
    _replace(root / "etc/hostname", node.name + "\n")
    run = root / NODE_RUN[1:]
    (run / "certs").mkdir(parents=True, mode=0o700)
    nodes = [{"name": other.name, "address": other.address, "port": PORT} for other in plan.nodes]
    roll = {"lab": plan.name, "own_name": node.name, "nodes": nodes}
    (run / "nodes.json").write_text(json.dumps(roll) + "\n")


def _replace(path: Path, text: str) -> None:
    # The host's may be a link into /run, which would be written instead.
    path.unlink(missing_ok=True)
    path.write_text(text)
