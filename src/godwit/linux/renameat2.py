"""renameat2(2): renaming with flags, which os.rename has not."""

from __future__ import annotations

from godwit.linux import abi
from godwit.types import Fd


def rename(old_directory: Fd, old: bytes, new_directory: Fd, new: bytes, flags: int) -> None:
    """Rename an entry. `flags` are RENAME_NOREPLACE 1, RENAME_EXCHANGE 2 and RENAME_WHITEOUT 4."""
    abi.syscall("renameat2", old_directory, old, new_directory, new, flags)
