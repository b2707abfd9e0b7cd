"""A link: messages between home and host, each delivered once and in order, whatever becomes of connections.

Each message counts. What the peer has not confirmed is kept, within a window, and sent again on the next
connection. The host's end can be put into words (`LinkState`) and go on at another machine, with an epoch
one higher; whoever speaks for an older epoch is not heard any more. docs/formats/link.md has the bytes.

Two threads serve a link. One reads and calls the handlers. The other tends: it writes what a handler could
not write without waiting, says a word when all is silent, and gives up a connection that says nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from godwit.errors import GodwitError
from godwit.residual.line import USUAL_SILENCE, Line, Pipe, Silence, greet
from godwit.residual.tally import LinkState, Tally
from godwit.residual.writing import Turn
from godwit.wire import linkframes
from godwit.wire.linkframes import Greeting, ProtocolError, Side

_OVERDRAFT: Final = 4  # windows: what handlers, who cannot wait, may leave unconfirmed

Handler = Callable[[memoryview], None]


class LinkClosedError(GodwitError):
    """The link has ended: nothing more is sent."""


class FencedError(GodwitError):
    """One end speaks for an epoch that is over: the job has moved on."""


class Link:
    """One end of a link. `start` it, then `attach` a connection.

    Args:
        job: Whose, 16 bytes.
        epoch: How often the job has moved. Home's is the newest it has heard of.
        side: Which end this is.
        window_bytes: How much may be unconfirmed before `send` waits.
        silence: When to speak, and when to give up.
        on_down: Called by the reading thread with the reason when a connection is lost. Who owns the link
            then makes another one and calls `attach`, from another thread.
        on_end: Called by the reading thread when the link ends for good: with None after `close`, else with
            a FencedError, a ProtocolError or what a handler raised.
    """

    def __init__(
        self,
        job: bytes,
        epoch: int,
        side: Side,
        *,
        window_bytes: int = 4 << 20,
        silence: Silence = USUAL_SILENCE,
        on_down: Callable[[BaseException], None] = lambda _: None,
        on_end: Callable[[BaseException | None], None] = lambda _: None,
    ) -> None:
        assert len(job) == linkframes.JOB_BYTES
        self.job = job
        self.epoch = epoch
        self.side = side
        self._window_bytes = window_bytes
        self._silence = silence
        self._on_down = on_down
        self._on_end = on_end
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._attaching = threading.Lock()
        self._tally = Tally()
        self._turn = Turn(self._tally, self._lock, self._changed, self._lose)
        self._line: Line | None = None
        self._waits_since_s: float | None = None  # the reader, for the peer
        self._handling = False
        self._paused = False
        self._ended = False
        self._end_reason: BaseException | None = None
        self._reader: threading.Thread | None = None
        self._tender: threading.Thread | None = None

    def restore(self, state: LinkState) -> None:
        """Go on where `state` stopped, one epoch later. Called before `start`, on a fresh link of that job.

        Raises:
            ProtocolError: The state cannot be one.
        """
        assert self._reader is None
        assert state.job == self.job
        self._tally = self._turn.tally = Tally.of(state)
        self.epoch = state.epoch + 1

    def start(self, handlers: Mapping[int, Handler]) -> None:
        """Begin to serve: the handlers, by channel, are called by one thread, message after message.

        A handler's memoryview is good until it returns. It may send, and does not wait for the window then.
        What a handler raises ends the link.
        """
        name = f"link {self.job.hex()[:8]}"
        self._reader = threading.Thread(target=self._serve, args=(handlers,), name=name, daemon=True)
        self._tender = threading.Thread(target=self._tend, name=f"{name} tender", daemon=True)
        self._reader.start()
        self._tender.start()

    @property
    def up(self) -> bool:
        """Whether there is a connection that is not known to be lost."""
        return (line := self._line) is not None and line.lost is None

    @property
    def ended(self) -> bool:
        """Whether the link has ended for good."""
        return self._ended

    @property
    def unconfirmed_bytes(self) -> int:
        """How much is kept until the peer confirms it."""
        return self._tally.held_bytes

    def send(self, channel: int, *parts: bytes, wait: bool = True) -> None:
        """Send a message; it will be delivered once, after those sent before.

        The parts are kept by reference. On return the message is with the kernel, or will be written by
        another thread, or by `attach`. Waits while the window is full or the link quiesced, and for the
        kernel. In a handler, or without `wait`, for neither: who sends so asks `has_room` before.

        Raises:
            LinkClosedError: The link has ended.
        """
        length = sum(map(len, parts))
        assert length <= linkframes.PAYLOAD_LIMIT_BYTES
        assert channel != linkframes.OWN_CHANNEL
        wait = wait and threading.current_thread() is not self._reader
        with self._lock:
            self._wait_for_room(length, wait=wait)
            self._tally.add(channel, parts, length)
            line = self._line
            if line is None or not self._turn.begin(line):
                return
        if wait:
            self._turn.write_out(line)
        else:
            self._turn.write_without_waiting(line, length)

    def has_room(self, length_bytes: int, patience_s: float = 0) -> bool:
        """Tell whether the window takes so many bytes within the time; an ended link takes everything."""
        with self._lock:
            return self._changed.wait_for(lambda: self._ended or self._fits(length_bytes), patience_s)

    def attach(self, pipe: Pipe, heard: Greeting | None = None) -> None:
        """Go on over a fresh connection; the one before, if any, is cut.

        On return what the peer lacks has been sent again. The pipe is ours now and is closed by us.

        Args:
            pipe: Nothing was written to it yet.
            heard: The peer's greeting, if it was read already.

        Raises:
            FencedError: One of both ends is of an epoch that is over. The host's link has ended then.
            ProtocolError: The peer counts wrong, or is no peer of ours.
            LinkClosedError: The link has ended.
            OSError: The connection failed.
        """
        assert self._reader is not None
        assert threading.current_thread() is not self._reader
        with self._attaching:
            try:
                if heard is not None:
                    self._check_greeting(heard)  # Strangers do not cost us the present connection.
                self._leave_line()
                line = self._take_line(pipe, heard)
            except BaseException as error:
                pipe.cut()
                pipe.close()
                if self.side is Side.HOST and isinstance(error, FencedError):
                    self._end(error)
                raise
            # The reader reads already: both ends may have more to send again than the kernel holds.
            self._turn.write_out(line)

    def fence(self, epoch: int) -> None:
        """Hear nobody any more who speaks for an older epoch."""
        with self._lock:
            line = self._line if epoch > self.epoch else None
            self.epoch = max(self.epoch, epoch)
        if line is not None:
            self._lose(line, FencedError(f"the job has moved on, to epoch {epoch}"))

    def quiesce(self) -> LinkState:
        """Stop, and return all there is to say of this end. The connection stays, unused.

        On return no handler runs, none will be called, and every message counted as received was handled.
        `go_on` takes it back; `close` makes it final.
        """
        assert threading.current_thread() is not self._reader
        with self._lock:
            self._paused = True
            self._changed.wait_for(lambda: not self._handling)
            return self._tally.state(self.job, self.epoch)

    def go_on(self) -> None:
        """Take `quiesce` back: the move failed."""
        with self._lock:
            self._paused = False
            self._changed.notify_all()

    def close(self) -> None:
        """End the link: who waits in `send` gets LinkClosedError. Its threads have ended on return."""
        self._end(None)
        for thread in (self._reader, self._tender):
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    # -- sending

    def _wait_for_room(self, length: int, *, wait: bool) -> None:
        if wait:
            self._changed.wait_for(lambda: self._ended or (not self._paused and self._fits(length)))
        elif self._tally.held_bytes > _OVERDRAFT * self._window_bytes:
            raise ProtocolError("the peer asks on and on, and does not take the answers")
        self._check_open()

    def _fits(self, length: int) -> bool:
        # A message larger than the window may go alone.
        return not self._tally.held_bytes or self._tally.held_bytes + length <= self._window_bytes

    def _check_open(self) -> None:
        if self._ended:
            raise LinkClosedError("the link has ended") from self._end_reason

    # -- reading: one thread

    def _serve(self, handlers: Mapping[int, Handler]) -> None:
        reason: BaseException | None = None
        try:
            while (line := self._next_line()) is not None:
                self._read(line, handlers)
                self._retire(line)
                if not self._ended and line.lost is not None:
                    self._on_down(line.lost)
        except (ProtocolError, LinkClosedError) as error:
            reason = error
        except BaseException as error:
            reason = error
            raise
        finally:
            self._end(reason)
            if self._line is not None:
                self._retire(self._line)
            self._on_end(self._end_reason)

    def _next_line(self) -> Line | None:
        with self._lock:
            self._changed.wait_for(lambda: self._line is not None or self._ended)
            return None if self._ended else self._line

    def _read(self, line: Line, handlers: Mapping[int, Handler]) -> None:
        """Read frames and handle them until the connection is lost or the link ends."""
        count = 1
        while count and self._handle(line, handlers):
            self._waits_since_s = time.monotonic()
            try:
                count = line.read()
            except OSError as error:
                self._lose(line, error)
            self._waits_since_s = None
        if not count:
            self._lose(line, ConnectionError("the peer ended the connection"))

    def _handle(self, line: Line, handlers: Mapping[int, Handler]) -> bool:
        """Handle every whole message that was read. Returns False if the line is over."""
        for channel, payload, count in line.frames():
            handler = handlers.get(channel)
            if handler is None and channel != linkframes.OWN_CHANNEL:
                raise ProtocolError(f"the peer uses channel {channel}, which nobody serves")
            with self._lock:
                if (self._paused and not self._may_go_on(line)) or line.lost is not None:
                    return False
                if self._tally.confirm(count):
                    self._changed.notify_all()
                if handler is None:
                    continue
                self._handling = True
                self._tally.receive(len(payload))
            handler(payload)
        self._rest(line)
        return line.lost is None

    def _may_go_on(self, line: Line) -> bool:
        """Wait while the link is quiesced. Returns False if the line is over by then."""
        self._handling = False
        self._changed.notify_all()
        self._changed.wait_for(lambda: not self._paused or line.lost is not None)
        return line.lost is None

    def _rest(self, line: Line) -> None:
        """Note that no handler runs, and confirm what came if the peer has not been told for long."""
        with self._lock:
            self._handling = False
            if self._paused:
                self._changed.notify_all()
                return
            # Whoever writes just now tells the count.
            if not self._tally.note_word_due() or not self._turn.begin(line):
                return
        self._turn.write_without_waiting(line, 0)

    # -- connections

    def _take_line(self, pipe: Pipe, heard: Greeting | None) -> Line:
        """Greet, and make the connection ours. It is our turn to write on return."""
        # No handler runs: the count stands still.
        mine = Greeting(side=self.side, job=self.job, epoch=self.epoch, received=self._tally.received)
        pipe.write(linkframes.pack_greeting(mine))
        if heard is None:
            heard = greet(pipe, self._silence.give_up_s)
        line = Line(pipe)
        with self._lock:
            self._check_open()
            self._check_greeting(heard)
            self.epoch = max(self.epoch, heard.epoch)
            self._tally.confirm(heard.received)
            self._tally.rewind()
            self._line = line
            self._turn.begin(line)
            self._changed.notify_all()
        return line

    def _check_greeting(self, heard: Greeting) -> None:
        if heard.job != self.job or heard.side == self.side:
            raise ProtocolError("the connection is that of another link")
        if self.side is Side.HOME and heard.epoch < self.epoch:
            raise FencedError(f"the host speaks for epoch {heard.epoch}; the job is in epoch {self.epoch}")
        if self.side is Side.HOST and heard.epoch > self.epoch:
            raise FencedError(f"the job is in epoch {heard.epoch}; this is epoch {self.epoch}")

    def _leave_line(self) -> None:
        """Cut the present connection, and wait until nobody uses it."""
        line = self._line
        if line is not None:
            self._lose(line, ConnectionError("another connection takes its place"))
        with self._lock:
            self._changed.wait_for(lambda: self._line is None or self._ended)
            self._check_open()

    def _lose(self, line: Line, error: BaseException) -> None:
        """Note that a connection is lost. Its reader and its writer find out."""
        with self._lock:
            line.lost = line.lost or error
            self._changed.notify_all()
        line.pipe.cut()

    def _retire(self, line: Line) -> None:
        """Close a connection that is lost, when nobody writes to it any more."""
        with self._lock:
            self._handling = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._turn.taken)
        # Closed by the reader alone, and before there is another: nobody uses the descriptor.
        line.pipe.close()
        with self._lock:
            self._line = None
            self._changed.notify_all()

    def _end(self, reason: BaseException | None) -> None:
        with self._lock:
            if not self._ended:
                self._ended, self._end_reason = True, reason
            self._changed.notify_all()
            self._turn.errand.notify()
            line = self._line
        if line is not None:
            self._lose(line, reason or LinkClosedError("the link has ended"))

    # -- tending: one thread

    def _tend(self) -> None:
        tick_s = min(self._silence.ping_s, self._silence.give_up_s) / 4
        while not self._ended:
            with self._lock:
                if not self._ended and (self._turn.taken or not self._tally.word_due):
                    self._turn.errand.wait(tick_s)
                line = self._line
                if line is None or line.lost is not None:
                    self._tally.word_due = False
                    continue
                now_s = time.monotonic()
                since_s = self._waits_since_s
                silent = since_s is not None and now_s - since_s >= self._silence.give_up_s
                self._tally.word_due |= now_s - self._turn.wrote_s >= self._silence.ping_s
                write = self._tally.word_due and self._turn.begin(line)
            if silent:
                self._lose(line, TimeoutError(f"nothing was heard for {self._silence.give_up_s:g} s"))
            if write:
                self._turn.write_out(line, for_ever=True)
