"""`godwit recover`: settle moves that were cut off while they were being decided."""

from __future__ import annotations

import click

from godwit.cli.output import common_options, examples, printable, say, say_json, settings, table
from godwit.errors import MigrationError

# How the outcome of a move begins that is not settled, or not well.
_BAD = ("still undecided", "lost")


@click.command(epilog=examples("godwit recover", "godwit recover --json"))
@common_options
def recover() -> int:
    """Settle moves that were cut off while they were being decided.

    When a machine, the network or Godwit dies in the moment of a decision, the copy at either end
    waits, frozen, until it is known which one runs. This reads the journals of such moves, asks the
    other end, and lets a copy run or removes it. At no time two copies run.

    Exit status: 0 when everything is settled, 9 when a program still waits, or is lost.
    """
    from godwit import api

    settled = api.recover()
    if settings().as_json:
        rows = [
            {"migration": each.migration, "role": each.role, "outcome": each.outcome, "pid": each.pid}
            for each in settled
        ]
        say_json({"recovered": rows})
    elif not settled:
        say("nothing to recover")
    else:
        told = ((each.migration, each.role, f"pid {each.pid}", printable(each.outcome)) for each in settled)
        for line in table(told):
            say(line)
    return MigrationError.exit_status if any(each.outcome.startswith(_BAD) for each in settled) else 0
