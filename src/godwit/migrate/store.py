"""Where images lie: a directory with one, or a directory with a series of them.

A series has a directory for each image, 0001 and so on. An image may go on from another, which it knows by
the name and the digest of its stream, and never by a path. When an image is dropped and others still go on
from it, its directory is hidden by a dot, and removed with the last of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from godwit.errors import AccessError, GodwitError, ImageError, RequestError
from godwit.images import codec
from godwit.migrate.channel import Channel, Closed, FdPipe
from godwit.migrate.entries import HeaderEntry
from godwit.migrate.imagefile import PARTIAL_NAME, STREAM_NAME, sync_directory
from godwit.types import OwnedFd
from godwit.wire.frames import FrameKind

__all__ = ["STREAM_NAME", "Opened", "chain", "drop_older", "image_in", "names", "sweep"]

_NAME: Final = re.compile(r"(\.?)([0-9]{4,9})(\.partial)?")
_IDENT: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a directory in a series."""

    number: int
    hidden: bool
    partial: bool

    @classmethod
    def parse(cls, text: str) -> Name | None:
        """Take a name apart; None: it is not one of ours."""
        found = _NAME.fullmatch(text)
        if found is None or (found[3] and not found[1]):
            return None
        return cls(int(found[2]), bool(found[1]), bool(found[3]))

    def __str__(self) -> str:
        return f"{'.' * self.hidden}{self.number:04}{'.partial' * self.partial}"


def names(directory: Path) -> list[Name]:
    """List what a directory has of a series, by number."""
    found = [Name.parse(name) for name in os.listdir(directory)]
    return sorted((name for name in found if name is not None), key=lambda name: name.number)


def image_in(directory: Path) -> Path:
    """Return the directory itself if it holds an image, or that of the newest in it.

    Raises:
        RequestError: There is none.
    """
    if (directory / STREAM_NAME).is_file():
        return directory
    with contextlib.suppress(OSError):
        for name in reversed(names(directory)):
            if not name.hidden and (directory / str(name) / STREAM_NAME).is_file():
                return directory / str(name)
    raise RequestError(
        f"{directory} holds no image",
        remedy=f"name a directory that has a {STREAM_NAME}, made by godwit checkpoint",
    )


@dataclass(frozen=True, slots=True)
class Opened:
    """An image's file, and what it says of itself."""

    path: Path
    fd: OwnedFd
    header: HeaderEntry

    def close(self) -> None:
        """Close the file."""
        self.fd.close()

    @classmethod
    def open(cls, directory: Path) -> Opened:
        """Open an image and read its header.

        Raises:
            AccessError: We may not, or should not.
            ImageError: It is no image.
        """
        path = directory / STREAM_NAME
        try:
            # A FIFO in its place must not keep us waiting.
            opened = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise AccessError(f"cannot read {path}: {error.strerror}", remedy="run as its owner") from error
        with opened as fd:
            status = os.fstat(fd.number)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{path} is not a file")
            if status.st_uid not in (0, os.geteuid()):
                raise AccessError(
                    f"{path} belongs to user {status.st_uid}:"
                    " restored as ours it could be made to do anything",
                    remedy="restore it as that user, or chown it if you trust it",
                )
            with about(path):
                header = _header(fd)
            return cls(path, fd.release(), header)


def _header(fd: OwnedFd) -> HeaderEntry:
    channel = Channel(FdPipe(fd.number, -1))
    channel.accept_stream()
    _, payload = channel.expect(FrameKind.HEADER)
    os.lseek(fd.number, 0, os.SEEK_SET)
    return codec.decode(payload, HeaderEntry)


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Say of which file it is that an image is not as it should be."""
    try:
        yield
    except Closed as error:
        raise ImageError(
            f"the image {path} is truncated: {error}", remedy="copy it again from the original"
        ) from error
    except ImageError as error:
        raise ImageError(f"{path}: {error.message}", remedy=error.remedy) from error


# --- images that go on from others ------------------------------------------------------------


@contextlib.contextmanager
def chain(directory: Path) -> Iterator[list[Opened]]:
    """Open an image, and those that it goes on from, oldest first.

    They are open before the first is read: a series that goes on may drop them meanwhile.

    Raises:
        ImageError: One is missing or damaged, or they do not belong together.
    """
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(contextlib.closing(Opened.open(directory)))]
        beside = _beside(directory) if links[0].header.parent else {}
        while links[-1].header.parent:
            with about(links[-1].path):
                links.append(stack.enter_context(contextlib.closing(_parent(links, beside))))
        links.reverse()
        yield links


def _beside(directory: Path) -> dict[str, list[Path]]:
    """Return the images that lie beside one, by what their streams are called.

    What is no image there is none of our business.
    """
    found: dict[str, list[Path]] = {}
    around = directory.resolve().parent
    for name in names(around):
        if name.partial:
            continue
        with (
            contextlib.suppress(GodwitError),
            contextlib.closing(Opened.open(around / str(name))) as opened,
        ):
            found.setdefault(opened.header.migration, []).append(around / str(name))
    return found


def _open_again(place: Path) -> Opened:
    """Open an image that was seen there; a series may have hidden it meanwhile."""
    try:
        return Opened.open(place)
    except AccessError:
        return Opened.open(place.with_name(f".{place.name}"))


def _parent(links: list[Opened], beside: dict[str, list[Path]]) -> Opened:
    child = links[-1].header
    if not _IDENT.fullmatch(child.parent):
        raise ImageError(f"it goes on from an image of the impossible name {child.parent[:64]!r}")
    if child.parent in {link.header.migration for link in links}:
        raise ImageError("it goes on from images that go on from each other, in a circle")
    found = beside.get(child.parent, [])
    if not found:
        raise ImageError(
            f"it goes on from image {child.parent}, which is not in {links[-1].path.parent.resolve().parent}",
            remedy="copy the whole directory again, hidden images too",
        )
    if len(found) > 1:
        raise ImageError(
            f"it goes on from image {child.parent}, which is there more than once",
            remedy=f"remove one of {found[0]} and {found[1]}",
        )
    with contextlib.ExitStack() as undo:
        opened = undo.enter_context(contextlib.closing(_open_again(found[0])))
        wrong = _difference(opened.header, child)
        if wrong:
            raise ImageError(f"it goes on from {found[0]}, which is of another {wrong}")
        undo.pop_all()
        return opened


def _difference(parent: HeaderEntry, child: HeaderEntry) -> str:
    """Say what the images of one series have in common, and these two do not."""
    if parent.pid != child.pid:
        return "program"
    if parent.architecture != child.architecture or parent.machine.page_bytes != child.machine.page_bytes:
        return "architecture"
    return "machine" if parent.machine.boot_id != child.machine.boot_id else ""


# --- series -----------------------------------------------------------------------------------


def sweep(directory: Path) -> None:
    """Remove what a series that was cut off has left half done."""
    for name in names(directory):
        if name.partial or (name.hidden and not (directory / str(name) / STREAM_NAME).exists()):
            _remove(directory / str(name))


def drop_older(directory: Path, keep: int) -> None:
    """Hide all but the newest images, and remove hidden ones that none of those goes on from.

    Each step is one rename or removal: whenever it is cut off, whatever can be seen can be restored.
    """
    found = names(directory)
    shown = [name for name in found if not name.hidden]
    for name in shown[:-keep]:
        (directory / str(name)).rename(directory / f".{name}")
    sync_directory(directory)
    parents: dict[str, str] = {}
    idents: dict[Name, str] = {}
    for name in names(directory):
        if name.partial:
            continue
        # Of an image that cannot be read nobody knows who needs it: it stays.
        with contextlib.suppress(GodwitError), contextlib.closing(Opened.open(directory / str(name))) as link:
            parents[link.header.migration] = link.header.parent
            idents[name] = link.header.migration
    needed: set[str] = set()
    for name, shown_ident in idents.items():
        ident = "" if name.hidden else shown_ident
        while ident and ident not in needed:
            needed.add(ident)
            ident = parents.get(ident, "")
    for name, ident in idents.items():
        if name.hidden and ident not in needed:
            _remove(directory / str(name))


def _remove(image: Path) -> None:
    """Remove an image's directory; what else somebody has put there stays, and with it the directory."""
    with contextlib.suppress(OSError):
        (image / STREAM_NAME).unlink(missing_ok=True)
        (image / PARTIAL_NAME).unlink(missing_ok=True)
        image.rmdir()
