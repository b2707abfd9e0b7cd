"""The devices that every machine has are opened again at the destination."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from godwit.errors import ImageError
from godwit.resources import device
from godwit.resources.base import Disposition
from godwit.resources.device import DeviceEntry
from godwit.types import FileId
from tests.kernel.openfiles import Builder, flags_shown, held, moved, restored, same


@pytest.mark.parametrize("name", ["null", "zero", "full", "random", "urandom"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_the_same_device_is_opened_in_the_same_mode(name: str, flags: int) -> None:
    fd = os.open(f"/dev/{name}", flags)
    with held(fd) as child, restored(device.KIND, child) as builder, child.twin(fd) as twin:
        mine = moved(child, builder, fd)
        assert device.inspect(child.at(fd), child).disposition is Disposition.REBIND
        assert os.fstat(mine.number).st_rdev == os.fstat(twin.number).st_rdev
        same(flags_shown, mine, twin)


def test_a_name_that_leads_elsewhere_here_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "null").write_text("no device")
    for path in (tmp_path / "null", tmp_path / "missing" / "null", Path("/dev/tty")):
        entry = DeviceEntry(file_id=FileId(1), minor=3, path=bytes(path), flags=os.O_RDONLY)
        with device.restore(entry, Builder())[FileId(1)] as fd:
            assert os.readlink(f"/proc/self/fd/{fd.number}") == "/dev/null"


@pytest.mark.requires("root")
def test_a_null_of_the_programs_own_keeps_its_name(tmp_path: Path) -> None:
    os.mknod(tmp_path / "null", 0o20666, os.makedev(1, 3))
    entry = DeviceEntry(file_id=FileId(1), minor=3, path=bytes(tmp_path / "null"), flags=os.O_RDONLY)
    with device.restore(entry, Builder())[FileId(1)] as fd:
        assert os.readlink(f"/proc/self/fd/{fd.number}") == str(tmp_path / "null")


@pytest.mark.requires("root")
def test_a_block_device_of_the_same_number_is_not_opened(tmp_path: Path) -> None:
    os.mknod(tmp_path / "null", 0o60666, os.makedev(1, 3))
    entry = DeviceEntry(file_id=FileId(1), minor=3, path=bytes(tmp_path / "null"), flags=os.O_RDONLY)
    with device.restore(entry, Builder())[FileId(1)] as fd:
        assert os.readlink(f"/proc/self/fd/{fd.number}") == "/dev/null"


@pytest.mark.parametrize(("minor", "flags"), [(1, 0), (11, 0), (3, os.O_CREAT)])
def test_another_device_from_a_peer_is_refused(minor: int, flags: int) -> None:
    entry = DeviceEntry(file_id=FileId(1), minor=minor, path=b"/dev/mem", flags=flags)
    with pytest.raises(ImageError):
        device.restore(entry, Builder())


def test_other_devices_are_not_claimed() -> None:
    fd = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    with held(fd) as child:
        assert not device.claims(child.at(fd))
