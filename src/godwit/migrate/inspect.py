"""Looking before a move: what stands in its way, here and at the destination."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import replace

from godwit.engine import plan, target, view
from godwit.engine.plan import Plan
from godwit.errors import RefusedError
from godwit.migrate import apart, source
from godwit.migrate.apart import Line
from godwit.migrate.channel import Channel
from godwit.migrate.entries import VerdictEntry
from godwit.migrate.move import Move
from godwit.migrate.options import Options
from godwit.migrate.patience import Patience
from godwit.migrate.report import silent
from godwit.resources.base import Disposition, Finding
from godwit.types import Pid


def inspect(pid: Pid, *, tcp_close: bool = False) -> Plan:
    """List every holding of a process tree with its disposition. Nothing is stopped."""
    target.check(pid)
    return plan.looked_at(pid, view.Memory(closes_connections=tcp_close))


def inspect_for(pid: Pid, found: Plan, connect: Callable[[], Channel], *, tcp_close: bool = False) -> Plan:
    """Ask a machine whether it would take the tree; return the plan with what it refuses added."""

    def work(line: Line[VerdictEntry]) -> VerdictEntry:
        move = Move.begin(pid, "", connect, line, secrets.token_hex(16), Options(tcp_close=tcp_close))
        with contextlib.closing(connect()) as channel:
            channel.patience = Patience(move.check)
            try:
                source.prepare(move, channel)
            except RefusedError as error:
                return VerdictEntry(refusals=error.refusals)
            return VerdictEntry(refusals=())

    verdict = apart.run(work, VerdictEntry, silent)
    refused = tuple(
        Finding(
            disposition=Disposition.REFUSE, what=each.what, where=each.where, why=each.why, remedy=each.remedy
        )
        for each in verdict.refusals
    )
    return replace(found, findings=(*found.findings, *refused))
