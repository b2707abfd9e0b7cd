"""Files that a user asked for by name: whole and in their place, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from godwit.errors import DestinationError, GodwitError, RequestError

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def check(path: Path) -> None:
    """Say beforehand what would be in the way of `write`, as far as can be known without writing.

    Raises:
        RequestError: There is no such directory, it may not be written, or the name is taken by
            something that is no file.
    """
    try:
        target = _target(path)
    except OSError as error:
        raise _failed(path, error) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise RequestError(
            f"cannot write {path}: its directory may not be written", remedy="name another file"
        )


def write(path: Path, raw: bytes) -> None:
    """Put the bytes at `path`, in place of what was there. Nobody ever sees a part of them.

    A symbolic link stays one, and what it points to is replaced.

    Raises:
        RequestError: The path cannot be written.
        DestinationError: There is no room for it.
    """
    try:
        target = _target(path)
        draft = target.with_name(f".godwit-{secrets.token_hex(8)}")
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with os.fdopen(fd, "wb") as file:
                file.write(raw)
            draft.rename(target)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
    except OSError as error:
        raise _failed(path, error) from error


def _target(path: Path) -> Path:
    """Return what `path` points to, which need not be there; but its directory must."""
    target = Path(os.path.realpath(path))
    directory = target.parent.stat()
    if not stat.S_ISDIR(directory.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    try:
        found = target.lstat()
    except FileNotFoundError:
        return target
    # A rename over /dev/null would succeed.
    if not stat.S_ISREG(found.st_mode):
        raise RequestError(f"cannot write {path}: it is there, and is no regular file")
    return target


def _failed(path: Path, error: OSError) -> GodwitError:
    what = f"cannot write {path}: {error.strerror}"
    if error.errno in _NO_ROOM:
        return DestinationError(what, remedy="make room there, or name another file")
    return RequestError(what, remedy="name another file")
