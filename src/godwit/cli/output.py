"""What every command shares: its common options, tables for people, JSON for programs.

Names of files and programs are chosen by strangers. Whatever is shown goes through `printable`, so
that no name can move the cursor or end a line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from godwit.log import log

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Function = TypeVar("Function", bound=Callable[..., object])

READER_GONE = 141  # as a shell sees a program that SIGPIPE ended


@dataclass(slots=True, kw_only=True)
class Settings:
    """The common options, wherever on the line they stood."""

    as_json: bool = False
    quiet: bool = False
    verbose: int = 0
    debug: bool = False

    @property
    def silent(self) -> bool:
        """Whether progress is to be kept to ourselves."""
        return self.as_json or self.quiet


def settings() -> Settings:
    """Return the settings of the command that runs."""
    return click.get_current_context().find_root().ensure_object(Settings)


def examples(*lines: str) -> str:
    """Lay out the end of a help page."""
    # \b keeps click from filling the lines like a paragraph.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def common_options(function: Function) -> Function:
    """Give a command --json, --quiet, --verbose and --debug."""
    return _json_option(log_options(function))


def log_options(function: Function) -> Function:
    """Give a command --quiet, --verbose and --debug."""
    function = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_keep,
        help="Log every detail, and show where in the code an error arose.",
    )(function)
    function = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_keep,
        help="Log what happens on standard error; twice: in detail.",
    )(function)
    return click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_keep, help="No progress, no notes."
    )(function)


def _json_option(function: Function) -> Function:
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        expose_value=False,
        callback=_keep,
        help="Print JSON for programs (docs/formats/json.md).",
    )(function)


def _keep(context: click.Context, parameter: click.Parameter, value: bool | int) -> None:
    kept = context.find_root().ensure_object(Settings)
    match parameter.name:
        case "as_json":
            kept.as_json |= bool(value)
        case "quiet":
            kept.quiet |= bool(value)
        case "debug":
            kept.debug |= bool(value)
        case _:
            kept.verbose += value
    if kept.debug or kept.verbose > 1:
        log.setLevel(logging.DEBUG)
    elif kept.verbose:
        log.setLevel(logging.INFO)
    elif kept.quiet:
        log.setLevel(logging.ERROR)


_IGNORED = {
    "tcp_established": "connections move or are refused by name; see `godwit check`",
    "shell_job": "terminals move or are refused by name; see `godwit check`",
    "file_locks": "locks move or are refused by name; see `godwit check`",
}


def tcp_close_option(function: Function) -> Function:
    """Let TCP connections break instead of standing in the way."""
    return click.option(
        "--tcp-close",
        "tcp_close",
        is_flag=True,
        help="Let TCP connections break: the program finds them reset by the peer, and clients come again.",
    )(function)


def foreign_options(function: Function) -> Function:
    """Accept options that users of other tools type, and say that they do nothing."""
    for name in _IGNORED:
        flag = "--" + name.replace("_", "-")
        option = click.option(flag, is_flag=True, hidden=True, expose_value=False, callback=_ignore)
        function = option(function)
    return function


def _ignore(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    name = parameter.name or ""
    if value and not context.find_root().ensure_object(Settings).quiet:
        click.echo(f"godwit: note: {parameter.opts[0]} does nothing here: {_IGNORED[name]}", err=True)


class PidType(click.ParamType[int]):
    """A pid; the shell completes it from the processes there are."""

    name = "pid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """Return the number; fail unless it is one that a process can have."""
        if not (text := str(value)).isdecimal() or not text.isascii() or not 0 < int(text) < 1 << 22:
            self.fail(f"{printable(text)!r} is not a pid", param, ctx)
        return int(text)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Offer pids of processes with a program, and their names."""
        from click.shell_completion import CompletionItem

        found: list[CompletionItem] = []
        for name in os.listdir("/proc"):
            if name.isdecimal() and name.startswith(incomplete):
                # It may end while we look.
                with contextlib.suppress(OSError), open(f"/proc/{name}/comm") as comm:
                    os.readlink(f"/proc/{name}/exe")
                    found.append(CompletionItem(name, help=printable(comm.read().strip())))
        return found


PID = PidType()


def printable(text: str) -> str:
    """Return the text with everything that is no visible character or space escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def say(text: str = "") -> None:
    """Print a line of the result. Ends the program quietly when nobody reads any more."""
    _write(text)


def say_json(value: object) -> None:
    """Print a value, of dataclasses, containers, numbers and strings, as one line of JSON."""
    import msgspec

    _write(msgspec.json.encode(msgspec.to_builtins(value)).decode())


def _write(text: str) -> None:
    try:
        click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        sys.exit(READER_GONE)


def table(rows: Iterable[Sequence[str]], *, indent: str = "") -> Iterator[str]:
    """Lay rows out in columns as wide as their widest cell; the last column is as long as it likes."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield (indent + "  ".join(cells)).rstrip()


def counted(number: int, word: str, plural: str = "s") -> str:
    """Return a number with its word."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}{plural}"


def amount(length_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if length_bytes < 1024:
            return f"{length_bytes:.0f} {unit}" if unit == "B" else f"{length_bytes:.1f} {unit}"
        length_bytes /= 1024
    return f"{length_bytes:.1f} TiB"
