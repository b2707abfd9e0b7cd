"""Every kind of open file, in the order of restoring."""

from __future__ import annotations

from typing import Final

from godwit.errors import ImageError, InternalError
from godwit.resources import (
    device,
    epoll,
    eventfd,
    inet,
    memfd,
    pipe,
    refused,
    regular,
    signalfd,
    timerfd,
    unixsocket,
)
from godwit.resources.base import FileKind, OpenFile

KINDS: Final[tuple[FileKind, ...]] = (
    refused.KIND,  # first: it claims by table what looks like another kind
    device.KIND,
    memfd.KIND,  # before files: a memfd is one
    pipe.KIND,
    eventfd.KIND,
    timerfd.KIND,
    signalfd.KIND,
    unixsocket.KIND,
    inet.KIND,
    regular.KIND,
    epoll.KIND,  # after every file it can watch
    refused.UNKNOWN,  # last: it claims whatever nobody else did
)


def kind_of(file: OpenFile) -> FileKind:
    """Return the kind that claims a file; the last one claims all that is left."""
    for kind in KINDS:
        if kind.claims(file):
            return kind
    raise InternalError(f"{file.where}: no kind claims {file.link}")


def kind_by_tag(tag: int) -> FileKind:
    """Return the kind written with this number. Raises ImageError for one we do not know."""
    for kind in KINDS:
        if kind.tag == tag:
            return kind
    raise ImageError(
        f"the image holds an open file of kind {tag}, which this Godwit does not know",
        remedy="use the Godwit version that wrote it, or a newer one",
    )
