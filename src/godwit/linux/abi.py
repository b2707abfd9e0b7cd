"""syscall(2): any system call by its name, with errors raised."""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final, NoReturn

from godwit.linux.arch import NR

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# The interpreter lock stays held across these: a child made by clone3 would otherwise wake with a
# lock that no thread of its own can release.
_libc_locked = ctypes.PyDLL(None, use_errno=True)
_syscall_locked = _libc_locked.syscall
_syscall_locked.restype = ctypes.c_long

_BY_ADDRESS: Final[tuple[Any, ...]] = (ctypes.Array, ctypes.Structure)


def _argument(value: Any) -> Any:
    if isinstance(value, int):
        return ctypes.c_ulong(value & 0xFFFFFFFFFFFFFFFF)
    if isinstance(value, bytes):
        return ctypes.c_char_p(value)
    if isinstance(value, _BY_ADDRESS):
        return ctypes.byref(value)
    return value


def fail(number: int, what: str) -> NoReturn:
    """Raise the OSError (or its subclass) of errno `number`, saying which call failed."""
    raise OSError(number, f"{what}: {os.strerror(number)}")


def syscall(name: str, *args: Any) -> int:
    """Make the system call `name` in the calling thread and return its result.

    Integers are passed as 64-bit words, bytes by the address of their content (for the kernel to
    read only), ctypes arrays and structures by address.

    Raises:
        OSError: The call failed; `errno` is the kernel's, the message names the call. So callers
            catch `ProcessLookupError`, `PermissionError` and so on.
        KeyError: This machine has no call of that name.
    """
    result: int = _syscall(ctypes.c_long(NR[name]), *map(_argument, args))
    if result == -1:
        fail(ctypes.get_errno(), name)
    return result


def syscall_locked(name: str, *args: Any) -> int:
    """Like `syscall`, with the interpreter lock held throughout. For calls that fork."""
    result: int = _syscall_locked(ctypes.c_long(NR[name]), *map(_argument, args))
    if result == -1:
        fail(ctypes.get_errno(), name)
    return result


def is_error(result: int) -> bool:
    """Tell whether a raw result register holds -errno, as the kernel's IS_ERR_VALUE does."""
    return -4095 <= result < 0
