"""Pipes and sockets whose other end is at home: the bytes of a job's streams over its link.

At the host the program holds one end of a local pipe or socket pair, and the keeper the other. At home the
keeper holds a duplicate of the deputy's descriptor. Between the two go DATA, CREDIT, EOF and CLOSED for each
direction (docs/formats/link.md). A direction is over at either end once EOF went one way and CLOSED the
other: both are last words, so nothing can come for a stream that is gone.

What has to be closed where: the keeper's descriptor must be the only copy of its end that outlives the
program's. At the host nobody else keeps the keeper's end of the pair. At home the deputy's own copies hide
the end: `on_shut` tells, when the keeper closes its copy, that the deputy's are to be closed as well.

What lies in the local pipe or socket at the host is in the kernel, and moves with the program like the
content of any pipe. What came over the link and did not fit into it is part of the `StreamState`.

A pump reads ahead by what fits into the window and the local pipe. Who shares a pipe's read end at home with
the program that has left may so find less in it than before; a smaller window makes that smaller.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from godwit.residual.link import Link, LinkClosedError
from godwit.residual.streamend import StreamEnd, stream_end
from godwit.residual.streamstate import WINDOW_BYTES, Flow, StreamState
from godwit.types import OwnedFd
from godwit.wire import streamframes
from godwit.wire.linkframes import ProtocolError
from godwit.wire.streamframes import StreamWord

_STEP_BYTES: Final = 128 << 10
_ROOM_PATIENCE_S: Final = 0.02
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP


@dataclass(slots=True)
class _Stream:
    stream_id: int
    end: StreamEnd | None  # None: nothing is to be done with it any more
    window_bytes: int
    going_out: Flow
    coming_in: Flow
    credit_bytes: int
    owed_bytes: int
    queue: bytearray  # undelivered
    held: bool = False  # not to be read for now
    polled: int | None = None  # events that the descriptor is polled for


class Streams:
    """All streams of one link, and the thread that waits for their descriptors.

    Args:
        link: Its `send` is used, and nobody else uses the channel. `handler` is the channel's handler.
        channel: Which.
        on_shut: Called with the number of a stream when its local descriptor was closed, by a thread that
            must not be kept waiting.
    """

    def __init__(self, link: Link, channel: int, on_shut: Callable[[int], None] = lambda _: None) -> None:
        self._link = link
        self._channel = channel
        self._on_shut = on_shut
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._streams: dict[int, _Stream] = {}
        self._by_fd: dict[int, _Stream] = {}
        self._epoll = select.epoll()
        self._scratch = memoryview(bytearray(_STEP_BYTES))
        self._bell = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._epoll.register(self._bell.number, select.EPOLLIN)
        self._paused = False
        self._parked = False
        self._closed = False
        self._pump = threading.Thread(target=self._serve, name="streams", daemon=True)
        self._pump.start()

    def open(
        self, stream_id: int, fd: OwnedFd, *, reads: bool, writes: bool, window_bytes: int = WINDOW_BYTES
    ) -> None:
        """Serve a descriptor. The other end does the same with the same window, before the link has a line.

        Args:
            stream_id: Never used before on this link.
            fd: Ours from now on.
            reads: What can be read from it goes to the other end.
            writes: What comes from the other end is written to it.
            window_bytes: How much of each direction may be on the way.

        Raises:
            UnsupportedStateError: Neither a pipe nor a stream socket.
        """
        self.resume(
            StreamState(
                stream_id=stream_id,
                window_bytes=window_bytes,
                going_out=Flow.OPEN if reads else Flow.OVER,
                coming_in=Flow.OPEN if writes else Flow.OVER,
                credit_bytes=window_bytes,
                owed_bytes=0,
                undelivered=b"",
            ),
            fd,
        )

    def resume(self, state: StreamState, fd: OwnedFd | None) -> None:
        """Serve a descriptor where another keeper stopped.

        Args:
            state: How it was there.
            fd: Ours from now on; None if the state's is `shut`.

        Raises:
            ProtocolError: The state cannot be one.
            UnsupportedStateError: Neither a pipe nor a stream socket.
        """
        state.check()
        end = None if state.shut or fd is None else stream_end(fd)
        stream = _Stream(
            state.stream_id,
            end,
            state.window_bytes,
            state.going_out,
            state.coming_in,
            state.credit_bytes,
            state.owed_bytes,
            bytearray(state.undelivered),
        )
        with self._lock:
            assert state.stream_id not in self._streams
            self._streams[state.stream_id] = stream
            self._look(stream)

    @property
    def stream_ids(self) -> frozenset[int]:
        """The streams that are not over."""
        with self._lock:
            return frozenset(self._streams)

    def hold(self, stream_id: int, *, held: bool = True) -> None:
        """Leave what can be read where it is, until told otherwise. A stream that is over is left alone."""
        with self._lock:
            stream = self._streams.get(stream_id)
            if stream is not None:
                stream.held = held
                self._look(stream)

    def handler(self, payload: memoryview) -> None:
        """Take a message of the other end's: give it to the link as the channel's handler.

        Raises:
            ProtocolError: It names no stream, or sends more than it may.
        """
        word, stream_id, rest = streamframes.read(payload)
        with self._lock:
            stream = self._streams.get(stream_id)
            if stream is None:
                raise ProtocolError(f"{word.name} for stream {stream_id}, which is not there")
            if word is StreamWord.DATA:
                self._take_data(stream, rest)
            elif word is StreamWord.EOF:
                self._take_eof(stream)
            elif word is StreamWord.CREDIT:
                stream.credit_bytes += streamframes.read_credit(rest)
                if stream.credit_bytes > stream.window_bytes or stream.going_out is Flow.OVER:
                    raise ProtocolError(f"stream {stream_id} is given more credit than its window")
            else:
                self._take_closed(stream)
            self._look(stream)

    def quiesce(self) -> None:
        """Read no descriptor any more. Then the link is quiesced, and then `states` says how things are."""
        with self._lock:
            self._paused = True
            os.eventfd_write(self._bell.number, 1)
            self._changed.wait_for(lambda: self._parked or self._closed)

    def states(self) -> tuple[StreamState, ...]:
        """Return every stream's state, with this and the link quiesced."""
        with self._lock:
            assert self._paused
            return tuple(map(_state, self._streams.values()))

    def go_on(self) -> None:
        """Take `quiesce` back, after the link."""
        with self._lock:
            self._paused = False
            self._changed.notify_all()

    def close(self) -> None:
        """Close every descriptor: readers see an end, writers that nobody reads. The thread ends first."""
        with self._lock:
            self._closed = True
            os.eventfd_write(self._bell.number, 1)
            self._changed.notify_all()
        self._pump.join()
        for stream in self._streams.values():
            if stream.end is not None:
                stream.end.close()
        self._epoll.close()
        self._bell.close()

    # -- the pump: one thread

    def _serve(self) -> None:
        try:
            while not self._closed:
                self._serve_ready()
        except LinkClosedError:
            pass
        finally:
            with self._lock:
                self._closed = True
                self._changed.notify_all()

    def _serve_ready(self) -> None:
        """Wait until descriptors are ready, and serve each once."""
        events = self._epoll.poll()
        room = self._link.has_room(_STEP_BYTES)
        skipped = False
        for fd, mask in events:
            with self._lock:
                if self._paused or self._closed:
                    break
                stream = self._by_fd.get(fd)
                if stream is not None and stream.end is not None:
                    skipped |= not self._serve_one(stream, stream.end, mask, room=room)
        with self._lock:
            self._park()
        if skipped:
            self._link.has_room(_STEP_BYTES, _ROOM_PATIENCE_S)

    def _park(self) -> None:
        """Stand still while quiesced."""
        if not self._paused and not self._closed:
            return
        self._parked = True
        self._changed.notify_all()
        self._changed.wait_for(lambda: not self._paused or self._closed)
        self._parked = False
        if not self._closed:
            os.eventfd_read(self._bell.number)

    def _serve_one(self, stream: _Stream, end: StreamEnd, mask: int, *, room: bool) -> bool:
        """Move what can be moved. Returns False if there is something to read and the link has no room."""
        if stream.queue and mask & _WRITABLE:
            self._deliver(stream, end)
        elif mask & select.EPOLLERR and stream.coming_in is Flow.OPEN and stream.going_out is Flow.OVER:
            self._break(stream)
        wanted = _wants(stream) and mask & ~select.EPOLLOUT
        if wanted and room:
            self._fetch(stream, end)
        self._look(stream)
        return room or not wanted

    def _fetch(self, stream: _Stream, end: StreamEnd) -> None:
        count = end.receive(self._scratch[: stream.credit_bytes])
        if count:
            stream.credit_bytes -= count
            data = bytes(self._scratch[:count])
            self._say(streamframes.pack(StreamWord.DATA, stream.stream_id), data)
        elif count == 0:
            stream.going_out = Flow.ENDING
            self._say(streamframes.pack(StreamWord.EOF, stream.stream_id))

    # -- what comes in

    def _take_data(self, stream: _Stream, rest: memoryview) -> None:
        if stream.coming_in is Flow.BROKEN:
            return
        if stream.coming_in is not Flow.OPEN:
            raise ProtocolError(f"DATA for stream {stream.stream_id} after its end")
        if len(rest) + len(stream.queue) + stream.owed_bytes > stream.window_bytes:
            raise ProtocolError(f"stream {stream.stream_id} brings more than its window")
        waiting = bool(stream.queue)
        stream.queue += rest
        if not waiting and stream.end is not None:
            self._deliver(stream, stream.end)

    def _take_eof(self, stream: _Stream) -> None:
        if stream.coming_in is Flow.BROKEN:
            stream.coming_in = Flow.OVER
        elif stream.coming_in is Flow.OPEN and stream.end is not None:
            stream.coming_in = Flow.ENDING
            self._deliver(stream, stream.end)
        else:
            raise ProtocolError(f"an end of stream {stream.stream_id} that cannot be")

    def _take_closed(self, stream: _Stream) -> None:
        if stream.going_out is Flow.OVER:
            raise ProtocolError(f"nobody may close stream {stream.stream_id} now")
        if stream.going_out is Flow.OPEN:
            if stream.end is not None:
                stream.end.end_input()
            self._say(streamframes.pack(StreamWord.EOF, stream.stream_id))
        stream.going_out = Flow.OVER

    def _deliver(self, stream: _Stream, end: StreamEnd) -> None:
        """Write what fits, give credit for it, and pass the end on behind the last byte."""
        try:
            count = 1
            while stream.queue and count:
                with memoryview(stream.queue) as view:
                    count = end.give(view)
                del stream.queue[:count]
                stream.owed_bytes += count
        except OSError:
            self._break(stream)
            return
        if stream.coming_in is Flow.ENDING and not stream.queue:
            end.end_output()
            stream.coming_in = Flow.OVER
            self._say(streamframes.pack(StreamWord.CLOSED, stream.stream_id))
        elif stream.coming_in is Flow.OPEN and stream.owed_bytes >= stream.window_bytes // 4:
            self._say(streamframes.pack_credit(stream.stream_id, stream.owed_bytes))
            stream.owed_bytes = 0

    def _break(self, stream: _Stream) -> None:
        """Nobody will read what comes: let the other end's writer know."""
        stream.queue.clear()
        stream.owed_bytes = 0
        stream.coming_in = Flow.OVER if stream.coming_in is Flow.ENDING else Flow.BROKEN
        self._say(streamframes.pack(StreamWord.CLOSED, stream.stream_id))

    # -- both

    def _say(self, *parts: bytes) -> None:
        # With the lock held, so that last words come last; hence without waiting.
        self._link.send(self._channel, *parts, wait=False)

    def _look(self, stream: _Stream) -> None:
        """Poll the descriptor for what can be done now, and close it when that is nothing any more."""
        if stream.going_out is not Flow.OPEN and stream.coming_in in (Flow.BROKEN, Flow.OVER):
            self._shut(stream)
            if stream.going_out is Flow.OVER and stream.coming_in is Flow.OVER:
                self._streams.pop(stream.stream_id, None)
        elif stream.end is not None:
            reading = stream.going_out is Flow.OPEN
            events = select.EPOLLIN if _wants(stream) else 0
            events |= select.EPOLLOUT if stream.queue else 0
            self._poll(stream, stream.end, events or stream.end.idle_events(reading=reading))

    def _poll(self, stream: _Stream, end: StreamEnd, events: int | None) -> None:
        if events == stream.polled:
            return
        fd = end.fileno()
        if events is None:
            self._epoll.unregister(fd)
            del self._by_fd[fd]
        elif stream.polled is None:
            self._by_fd[fd] = stream
            self._epoll.register(fd, events)
        else:
            self._epoll.modify(fd, events)
        stream.polled = events

    def _shut(self, stream: _Stream) -> None:
        end = stream.end
        if end is None:
            return
        # First: others may have the same open file description, which would be polled on without an owner.
        self._poll(stream, end, None)
        end.close()
        stream.end = None
        self._on_shut(stream.stream_id)


def _wants(stream: _Stream) -> bool:
    return stream.going_out is Flow.OPEN and stream.credit_bytes > 0 and not stream.held


def _state(stream: _Stream) -> StreamState:
    return StreamState(
        stream_id=stream.stream_id,
        window_bytes=stream.window_bytes,
        going_out=stream.going_out,
        coming_in=stream.coming_in,
        credit_bytes=stream.credit_bytes,
        owed_bytes=stream.owed_bytes,
        undelivered=bytes(stream.queue),
    )
