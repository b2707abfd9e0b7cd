"""What a job has at either end: two links, and what becomes of them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Final

from godwit.log import log
from godwit.residual import control
from godwit.residual.control import Message, Over
from godwit.residual.keeping import JobEntry
from godwit.residual.link import Handler, Link, LinkClosedError
from godwit.wire.linkframes import Side

_LAST_WORD_S: Final = 1.0
NAMES: Final = {control.FILES_LINK: "files", control.CONTROL_LINK: "control"}


class Job:
    """One end of a job. `over` is called once, from any thread, when there is no such job any more."""

    role = ""
    peer = ""

    def __init__(self, job: bytes, side: Side, over: Callable[[Job], None]) -> None:
        self.job = job
        self._over = over
        self._ending = threading.Lock()
        self._ended = False
        self.links = {which: self._link(which, side) for which in NAMES}
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="control", daemon=True)

    def _link(self, which: int, side: Side) -> Link:
        return Link(
            control.link_name(self.job, which),
            1,
            side,
            on_down=lambda error: self.down(which, error),
            on_end=lambda error: self.link_ended(which, error),
        )

    def start(self, handlers: Mapping[int, Mapping[int, Handler]]) -> None:
        """Begin to serve the links."""
        for which, link in self.links.items():
            link.start(handlers[which])
        self._sender.start()

    def tell(self, message: Message) -> None:
        """Tell the other keeper, after what was told before. Does not wait."""
        self._outbox.put(message)

    def _send_all(self) -> None:
        link = self.links[control.CONTROL_LINK]
        with contextlib.suppress(LinkClosedError):
            while (message := self._outbox.get()) is not None:
                link.send(control.CONTROL, control.pack(message))

    def down(self, which: int, error: BaseException) -> None:
        """Take note that a connection is lost: called by the link's reading thread."""
        log.info("job %s: %s link down: %s", self.job.hex(), NAMES[which], error)

    def link_ended(self, which: int, error: BaseException | None) -> None:
        """Take note that a link has ended for good."""
        if error is not None:
            log.warning("job %s: %s link ended: %s", self.job.hex(), NAMES[which], error)
        threading.Thread(target=self.end, daemon=True).start()

    def end(self) -> None:
        """End the job here: on return nothing of it is left. Again, it does nothing."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            self._outbox.put(Over())
            self._outbox.put(None)
            # The other keeper is told, if it can be reached.
            self._sender.join(_LAST_WORD_S)
            for link in self.links.values():
                link.close()
            self.release()
        self._over(self)

    def release(self) -> None:
        """Let go of what the job has here."""

    def entry(self) -> JobEntry:
        """Describe the job."""
        return JobEntry(
            job=self.job,
            role=self.role,
            peer=self.peer,
            tasks=(),
            connected=all(link.up for link in self.links.values()),
        )
