"""Ending the blocking system call of another thread of this process: tgkill(2), signal(7)."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

from godwit.linux import abi
from godwit.types import Tid

_SIGNAL: Final = signal.SIGRTMAX - 1


def prepare() -> None:
    """Make the signal for it one that ends a call with EINTR and does nothing else, in the whole process."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    # Any function that takes a number and has no effect will do for a handler.
    libc.signal(ctypes.c_int(_SIGNAL), ctypes.cast(libc.abs, ctypes.c_void_p))
    # Without this the kernel would begin the call again.
    libc.siginterrupt(ctypes.c_int(_SIGNAL), ctypes.c_int(1))


def interrupt(thread: Tid) -> None:
    """End the call that the thread is in; nothing happens to one that is in none. See `prepare`."""
    abi.syscall("tgkill", os.getpid(), thread, int(_SIGNAL))
