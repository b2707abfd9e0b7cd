"""Pre-copy: memory goes over in rounds while the program runs, until a freeze is short enough.

When that is, `convergence` decides. After Clark et al., "Live Migration of Virtual Machines", NSDI 2005.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Final

from godwit.engine import flushing, missing, plan
from godwit.engine.view import TreeView
from godwit.errors import GodwitError, MigrationError, RefusedError, Survivor
from godwit.images import codec
from godwit.log import log
from godwit.migrate import agreeing, carried, convergence, faults, lanes
from godwit.migrate import copying as copying_of
from godwit.migrate.channel import Channel
from godwit.migrate.convergence import Decision, Limits, Round, Step, Strategy
from godwit.migrate.copying import Copying
from godwit.migrate.entries import RoundEntry
from godwit.migrate.move import LANES, ROLE, Move
from godwit.types import PAGE_SIZE
from godwit.wire.frames import FrameKind

_LONG_S: Final = 0.2
_LATER: Final = (Strategy.POSTCOPY, Strategy.HYBRID)


@dataclass(slots=True)
class Rounds:
    """The rounds of one move."""

    move: Move
    channel: Channel
    copying: Copying
    done: list[Round] = field(default_factory=list[Round])
    decision: Decision | None = None

    def until_freeze(self) -> Decision:
        """Copy while it pays; return how to go on.

        Raises:
            MigrationError: The user's budget cannot be kept.
        """
        tree = agreeing.agree(self.move, self.channel)
        if self.move.options.strategy in _LATER and not self.move.armed:
            raise RefusedError([missing.refusal()])
        decision = self._decide(tree)
        if decision.step is Step.ROUND:
            self._open_lanes(tree)
        while decision.step is Step.ROUND:
            tree = self._one(tree)
            faults.at(ROLE, "round")
            decision = self._decide(tree)
        self.copying.lanes.finish()
        carried.check_users(tree, self.move.carried)
        plan.obey_newcomers(tree)
        flushing.flush_shared(tree)
        if decision.step is Step.GIVE_UP:
            raise MigrationError(
                f"the move was undone: {decision.why}",
                survivor=Survivor.SOURCE,
                remedy="allow a longer freeze with --max-freeze, or move it when it writes less",
            )
        if self.move.options.strategy is Strategy.HYBRID and self.move.armed:
            # Asked for by name: what is left follows, however little it is.
            decision = replace(decision, step=Step.HYBRID)
        if len(self.done) == 1 or (self.done and self.done[-1].seconds > _LONG_S):
            # To be tracked may have joined mappings; better learnt now than while it stands still.
            self._forget_advice()
            tree = agreeing.agree(self.move, self.channel)
        if decision.step is Step.HYBRID:
            assert self.move.told is not None
            self.copying.give_up_dense(tree, self.move.told[0])
            self._synchronise(len(self.done))
        return decision

    def _open_lanes(self, tree: TreeView) -> None:
        move = self.move
        count = lanes.connections(move.options, move.cpus_there) - 1
        if count and LANES in move.features and tree.private_bytes >= lanes.WORTH_BYTES:
            try:
                self.copying.lanes.open(count, move.migration, move.connect, move.patience)
            except (GodwitError, OSError) as error:
                if move.options.connections is not None:
                    raise
                # Nobody asked for them: who lets one connection in may turn the next away.
                log.info("memory goes over fewer connections: %s", error)

    def _decide(self, tree: TreeView) -> Decision:
        self.decision = convergence.decide(self.move.options.strategy, self.done, self._limits(tree))
        return self.decision

    def _limits(self, tree: TreeView) -> Limits:
        deadline = self.move.deadline
        return Limits(
            max_freeze_s=self.move.options.max_freeze_s,
            fixed_freeze_s=copying_of.fixed_freeze_s(tree),
            seconds_left=None if deadline is None else deadline - time.monotonic(),
            postcopy=self.move.armed,
        )

    def _one(self, before: TreeView) -> TreeView:
        """Do a round; return the tree as it was in it."""
        number, began_ns = len(self.done) + 1, time.monotonic_ns()
        move, stream = self.move, self.copying.stream
        self._forget_advice()
        tree = before if not self.done else agreeing.agree(move, self.channel)
        mark = self.copying.mark()
        total = max(self._expected_bytes(tree), PAGE_SIZE)

        def after_chunk(done: int) -> None:
            del done
            sent = self.copying.pages - mark.pages
            move.tell_round(number, sent * PAGE_SIZE, total, self._progress())
            move.check()
            if self.channel.has_word():
                agreeing.expect(self.channel)

        stream.after_chunk = after_chunk
        assert move.told is not None
        self.copying.round(tree, move.told[0])
        self._synchronise(number)
        found = self.copying.measure(tree, mark)
        self.done.append(found)
        if stream.packer is not None and found.seconds > convergence.LATENCY_S:
            stream.packer.measured(found.bytes / found.seconds)
        move.timeline.round(
            number, began_ns, time.monotonic_ns(), sent_pages=found.pages, dirty_pages=found.dirty_pages
        )
        return tree

    def _forget_advice(self) -> None:
        """After a long round, look anew: advice of a mapping changes without a trace in maps.

        To look takes 27 ms for a GiB.
        """
        if self.done and self.done[-1].seconds > _LONG_S:
            self.move.memory.smaps.clear()

    def _synchronise(self, number: int) -> None:
        """Return once all that was sent is in place."""
        self.channel.send(FrameKind.ROUND, codec.encode(RoundEntry(number=number)))
        agreeing.expect(self.channel, FrameKind.ROUND)

    def _expected_bytes(self, tree: TreeView) -> int:
        if self.done:
            return self.done[-1].dirty_pages * PAGE_SIZE
        return tree.private_bytes

    def _progress(self) -> tuple[float | None, float | None]:
        """Return the seconds that are left, and how long a freeze would last now, as far as known."""
        if not self.done or self.decision is None:
            return None, None
        return convergence.eta_s(self.done, self.done[-1].dirty_pages), self.decision.expected_freeze_s
