"""The files that an image knows by path, as the destination has them."""

from __future__ import annotations

import contextlib
import os

from godwit.errors import ImageError
from godwit.resources import pathfile
from godwit.resources.outline import OutlineEntry
from godwit.resources.roots import Root
from godwit.types import Fd


class OpenPaths(contextlib.ExitStack):
    """The image's path files, opened when first asked for and closed at the end."""

    def __init__(self, shape: OutlineEntry, root: Root) -> None:
        super().__init__()
        self._root = root
        self._shape = shape
        self._open: dict[tuple[int, int], Fd] = {}

    def open(self, index: int, flags: int) -> Fd:
        """Return a descriptor of path file `index`, good until the end of the block.

        Raises:
            ImageError: The image has no such file.
            RefusedError: It is not here, or is not the same.
        """
        if not 0 <= index < len(self._shape.path_files):
            raise ImageError(f"the image refers to file {index}, which it lacks")
        key = (index, flags)
        if key not in self._open:
            entry = self._shape.path_files[index]
            written = flags & os.O_ACCMODE == os.O_RDWR
            what = "mapped file"
            fd = self.enter_context(
                pathfile.opened(entry, flags, written=written, what=what, root=self._root)
            )
            self._open[key] = fd.number
        return self._open[key]
