"""Coming to terms with the source: what comes, and what is missing for it. `agreeing` is the other end."""

from __future__ import annotations

import time
from dataclasses import dataclass

from godwit.engine.build import Builder
from godwit.errors import RefusedError
from godwit.images import codec
from godwit.migrate import admit, receiving
from godwit.migrate.channel import Channel
from godwit.migrate.entries import HeaderEntry, VerdictEntry
from godwit.migrate.home import Lodging
from godwit.resources.outline import ClockEntry, OutlineEntry
from godwit.wire.frames import FrameKind


@dataclass(frozen=True, slots=True)
class Agreement:
    """What is to be prepared."""

    shape: OutlineEntry
    clock: ClockEntry
    heard_ns: int
    missing: tuple[bytes, ...]  # written files, opened too lately to be brought along yet


def agree(channel: Channel, header: HeaderEntry, builder: Builder, lodging: Lodging) -> Agreement:
    """Hear what comes, and say what is missing for it; return what was agreed on, and when it was heard.

    Files that the program writes and that are not here may be brought along: then it is told again.
    """
    asked = False
    while True:
        _, payload = channel.expect(FrameKind.OUTLINE)
        heard_ns = time.monotonic_ns()
        shape, demand, clock = receiving.read_outline(payload)
        if not asked:
            lodging.mount(builder)
        carry: set[bytes] = set()
        refusals = tuple(admit.refusals(header, shape, demand, in_pod=True, root=builder.root, carry=carry))
        if refusals:
            channel.send(FrameKind.VERDICT, codec.encode(VerdictEntry(refusals=refusals)))
            raise RefusedError(refusals)
        if asked or not carry:
            # What the program has opened since it was asked is agreed on once it is frozen.
            return Agreement(shape, clock, heard_ns, tuple(sorted(carry)))
        asked = True
        verdict = VerdictEntry(refusals=(), carry=tuple(sorted(carry)), prepared=False)
        channel.send(FrameKind.VERDICT, codec.encode(verdict))


def agree_again(channel: Channel, header: HeaderEntry, builder: Builder, payload: memoryview) -> None:
    """Hear how the tree has changed since it was agreed on, and prepare that. Raises RefusedError."""
    shape, demand, _ = receiving.read_outline(payload)
    carry: set[bytes] = set()
    refusals = tuple(
        admit.refusals(header, shape, demand, in_pod=True, root=builder.root, carry=carry, again=True)
    )
    if not refusals and not carry:
        builder.prepare(shape)
    verdict = VerdictEntry(
        refusals=refusals, carry=tuple(sorted(carry)), prepared=not carry, postcopy=builder.armed
    )
    channel.send(FrameKind.VERDICT, codec.encode(verdict))
    if refusals:
        raise RefusedError(refusals)
