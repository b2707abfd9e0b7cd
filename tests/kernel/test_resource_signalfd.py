"""A signalfd moves with its mask; the signals are the task's."""

from __future__ import annotations

import os
import signal
import struct

import pytest

from godwit.errors import ImageError
from godwit.linux import signalfd as kernel
from godwit.resources import signalfd
from godwit.resources.signalfd import SignalFdEntry
from godwit.types import FileId
from tests.kernel.openfiles import Builder, held, info_of, moved, restored


def test_a_signal_of_the_mask_is_read_after_the_move() -> None:
    mask = 1 << signal.SIGUSR1 - 1 | 1 << signal.SIGRTMAX - 1
    fd = kernel.create(mask).detach()
    with held(fd) as child, restored(signalfd.KIND, child) as builder, child.twin(fd) as twin:
        mine = moved(child, builder, fd)
        assert info_of(mine).fields["sigmask"] == info_of(twin).fields["sigmask"] == f"{mask:016x}"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        try:
            signal.raise_signal(signal.SIGUSR1)
            assert struct.unpack_from("=I", os.read(mine.number, 128)) == (signal.SIGUSR1,)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_an_impossible_mask_from_a_peer_is_refused() -> None:
    with pytest.raises(ImageError, match="impossible mask"):
        signalfd.restore(SignalFdEntry(file_id=FileId(1), mask=-1), Builder())
