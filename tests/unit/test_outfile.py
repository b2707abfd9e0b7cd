from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from godwit.errors import DestinationError, GodwitError, RequestError
from godwit.migrate import outfile


def test_a_file_replaces_the_old_one_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    outfile.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    outfile.write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for call in (outfile.check, lambda path: outfile.write(path, b"x")):
        with pytest.raises(RequestError, match="no regular file"):
            call(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("name", ["missing/out", "file/out", "loop/out", "x" * 300])
def test_a_path_that_cannot_be_written_is_a_wrong_request(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RequestError, match="cannot write"):
        outfile.write(tmp_path / name, b"x")
    with pytest.raises(RequestError, match="cannot write"):
        outfile.check(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_a_directory_that_may_not_be_written_is_told_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK | os.X_OK))
    with pytest.raises(RequestError, match="may not be written"):
        outfile.check(tmp_path / "trace.json")


def test_checking_a_path_that_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    outfile.check(tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "wanted"), [(errno.ENOSPC, DestinationError), (errno.EACCES, RequestError)]
)
def test_a_write_that_fails_says_whose_fault_it_is_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, wanted: type[GodwitError]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "out").write_bytes(b"old")
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(wanted, match=f"cannot write .*: {os.strerror(number)}"):
        outfile.write(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]
