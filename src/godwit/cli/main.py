"""The `godwit` command: finds the subcommand, and turns every way it can fail into words and a status.

It must be there in 150 ms, so a subcommand's module is imported when it is called.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import traceback
from collections.abc import Sequence

import click

from godwit import __version__
from godwit.cli.output import Settings, examples, log_options, printable, say_json
from godwit.errors import GodwitError, MigrationError, RefusedError, RequestError
from godwit.log import log, to_stderr

INTERRUPTED = 130
BUG = 70  # EX_SOFTWARE, as for InternalError

# What `godwit --help` says, without importing the modules. A test compares.
SUMMARIES = {
    "check": "Say whether process PID can move, and why not.",
    "migrate": "Move process PID and its descendants to HOST.",
    "receive": "Be the other end of a migration.",
    "checkpoint": "Write process PID and its descendants to a directory.",
    "restore": "Make what a checkpoint holds run again.",
    "recover": "Settle moves that were cut off while they were being decided.",
    "certs": "Make certificates for machines that move processes to each other.",
    "lab": "Machines made of namespaces, all on this computer.",
    "demo": "Watch a running program fly between three machines.",
    "bench": "What a move spent its time on, drawn and in numbers.",
    "keeper": "Be the keeper of this user and machine, unless there is one.",
    "completion": "Print what makes a shell complete godwit's words.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for: `cli/NAME.py` holds NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return all names, in the order of the help page."""
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command; None: there is none of that name."""
        if cmd_name not in SUMMARIES:
            return None
        found = getattr(importlib.import_module(f"godwit.cli.{cmd_name}"), cmd_name)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands from `SUMMARIES`."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=examples(
        "godwit check 4711 --to alice@other        can it move there, and what becomes of what it holds?",
        "godwit migrate 4711 alice@other           move it, over ssh",
        "godwit checkpoint 4711 --output DIR       lay it down",
        "godwit restore DIR                        wake it again",
        "godwit demo                               see a program fly",
    ),
)
@click.version_option(__version__, prog_name="godwit", message="%(prog)s %(version)s")
@log_options
def cli() -> None:
    """Move running, unmodified Linux processes from one machine to another.

    What cannot be carried is refused by name, before anything has been touched. Whatever fails
    before a move is decided, the program runs on where it was.

    Exit status: 0 done, 2 wrong request, 3 refused, 4 not allowed, 5 no such process, 6 bad image, 7 the
    destination cannot take it, 8 busy, 9 a move failed after it had begun, 70 a bug (docs/errors.md).
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        arguments: Without the program's name; None takes the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Before click has understood the line it may already have failed, and JSON was asked for.
    settings = Settings(as_json="--json" in itertools.takewhile(lambda word: word != "--", words))
    if not log.handlers:
        to_stderr(logging.WARNING)
    try:
        status = cli.main(words, prog_name="godwit", standalone_mode=False, obj=settings)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return RequestError.exit_status
    except click.ClickException as error:
        return _failed(_as_request_error(error), settings)
    except GodwitError as error:
        return _failed(error, settings)
    except (KeyboardInterrupt, click.Abort):
        click.echo("godwit: interrupted", err=True)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last door: what comes here is a bug, and is said to be one
        return _bug(error, settings)
    return status if isinstance(status, int) else 0


def _as_request_error(error: click.ClickException) -> RequestError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else "godwit"
    return RequestError(error.format_message().rstrip("."), remedy=f"see `{command} --help`")


def _failed(error: GodwitError, settings: Settings) -> int:
    if settings.as_json:
        say_json({"error": _describe(error)})
    click.echo(f"godwit: error: {printable(error.line())}", err=True)
    _show_traceback(error, settings)
    return error.exit_status


def _describe(error: GodwitError) -> dict[str, object]:
    refusals = error.refusals if isinstance(error, RefusedError) else ()
    return {
        "class": type(error).__name__,
        "exit_status": error.exit_status,
        "message": printable(error.message),
        "remedy": printable(error.remedy),
        "survivor": error.survivor.value if isinstance(error, MigrationError) else None,
        "refusals": [
            {
                "what": printable(each.what),
                "where": printable(each.where),
                "why": printable(each.why),
                "remedy": printable(each.remedy),
            }
            for each in refusals
        ],
    }


def _bug(error: Exception, settings: Settings) -> int:
    told = printable(f"{type(error).__name__}: {error}")
    if settings.as_json:
        say_json(
            {
                "error": {
                    "class": "InternalError",
                    "exit_status": BUG,
                    "message": told,
                    "remedy": "report it",
                    "survivor": None,
                    "refusals": [],
                }
            }
        )
    hint = "" if settings.debug or settings.verbose else "; please report it, with what --debug prints"
    click.echo(f"godwit: bug: {told}{hint}", err=True)
    _show_traceback(error, settings)
    return BUG


def _show_traceback(error: BaseException, settings: Settings) -> None:
    if settings.debug or settings.verbose:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)


if __name__ == "__main__":
    sys.exit(main())
