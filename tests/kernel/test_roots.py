"""Names that begin at another root than ours."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from godwit.resources import fifo, objects, pathfile
from godwit.resources.fifo import Fifo
from godwit.resources.objects import ObjectEntry, ObjectKind
from godwit.resources.roots import Root
from godwit.types import OwnedFd
from tests.conftest import requires

pytestmark = requires("root")


@pytest.fixture
def root(tmp_path: Path) -> Root:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file").write_text("home")
    (tmp_path / "absolute").symlink_to("/sub/file")
    (tmp_path / "above").symlink_to("../../../../sub/file")
    return Root(directory=OwnedFd(os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)), at_home=True)


@pytest.mark.parametrize("name", [b"/sub/file", b"/absolute", b"/above", b"/../sub/file"])
def test_links_and_dots_stay_below_the_root(root: Root, name: bytes) -> None:
    with root.open(name, os.O_RDONLY) as found:
        assert os.read(found.number, 10) == b"home"
        assert not os.get_inheritable(found.number)


def test_what_is_only_below_our_root_is_not_found(root: Root) -> None:
    with pytest.raises(FileNotFoundError):
        root.open(b"/etc/passwd", os.O_RDONLY)


def test_a_written_file_at_home_is_the_very_file(root: Root, tmp_path: Path) -> None:
    with OwnedFd(os.open(tmp_path / "sub/file", os.O_RDWR)) as there:
        entry = pathfile.describe(there.number, b"/sub/file", content=False)
    with pathfile.opened(entry, os.O_RDWR, written=True, what="open file", root=root) as found:
        assert os.fstat(found.number).st_ino == entry.inode
    # Another file under the same name is another file at home too.
    (tmp_path / "sub/new").write_text("another")
    (tmp_path / "sub/new").rename(tmp_path / "sub/file")
    refusal = pathfile.find(entry, written=True, what="open file", root=root)
    assert refusal is not None
    assert "another file" in refusal.why


def test_a_fifo_at_home_is_found_and_not_made(root: Root, tmp_path: Path) -> None:
    entry = Fifo(path=b"/sub/fifo", deleted=False, mode=0o600, uid=0, gid=0)
    with pytest.raises(Exception, match="cannot open the fifo"):
        fifo.open_both_ends(entry, root)
    os.mkfifo(tmp_path / "sub/fifo")
    reader, writer = fifo.open_both_ends(entry, root)
    with reader, writer:
        os.write(writer.number, b"x")
        assert os.read(reader.number, 2) == b"x"


def test_a_nameless_file_is_made_on_the_file_system_of_its_directory(root: Root, tmp_path: Path) -> None:
    entry = ObjectEntry(
        object_id=1,
        kind=ObjectKind.DELETED_FILE,
        name=b"/sub/gone",
        size_bytes=5,
        mode=stat.S_IFREG | 0o600,
        uid=0,
        gid=0,
    )
    with objects.restore(entry, root) as made:
        assert os.fstat(made.number).st_dev == tmp_path.stat().st_dev
        assert os.fstat(made.number).st_nlink == 0
    assert sorted(os.listdir(tmp_path / "sub")) == ["file"]
