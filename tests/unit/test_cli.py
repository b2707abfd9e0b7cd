from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from godwit.cli import main as entry
from godwit.cli.main import cli, main
from godwit.errors import MigrationError, NoProcessError, Refusal, RefusedError, Survivor
from tests.unit.faces import Run, raising

ROOT = Path(__file__).resolve().parents[2]


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


# --- Words


def test_help_comes_without_heavy_libraries() -> None:
    heavy = "{'rich', 'ssl', 'cryptography', 'msgspec', 'asyncio', 'numpy', 'godwit.engine', 'godwit.lab'}"
    script = (
        f"import sys; from godwit.cli.main import main; main(['--help']); print({heavy} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "migrate" in done.stdout


def test_the_list_of_commands_says_what_the_commands_say() -> None:
    assert {name: command.get_short_help_str(200) for name, command in commands().items()} == entry.SUMMARIES


@pytest.mark.parametrize("name", entry.SUMMARIES)
def test_every_command_shows_examples_and_has_a_page(name: str) -> None:
    shown = CliRunner().invoke(cli, [name, "--help"]).output
    assert "Examples:" in shown
    page = (ROOT / "docs" / "man" / f"godwit-{name}.md").read_text()
    options = {
        option
        for parameter in commands()[name].params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for option in parameter.opts
    }
    common = (ROOT / "docs" / "man" / "godwit.md").read_text()
    assert [option for option in sorted(options) if f"`{option}" not in page + common] == []
    assert f"`godwit {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete"), ("zsh", "compdef"), ("fish", "complete --no-files")]
)
def test_completion_is_for_the_shell_that_was_asked_for(run: Run, shell: str, word: str) -> None:
    shown = run("completion", shell)
    assert shown.status == 0
    assert word in shown.out
    assert "_GODWIT_COMPLETE" in shown.out


def test_a_pid_is_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mine = str(os.getpid())
    monkeypatch.setenv("_GODWIT_COMPLETE", "fish_complete")
    monkeypatch.setenv("COMP_WORDS", f"godwit check {mine}")
    monkeypatch.setenv("COMP_CWORD", mine)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert mine in capsys.readouterr().out


# --- Failing


REFUSED = RefusedError(
    [
        Refusal(what="TCP connection", where="pid 12 fd 3", why="not carried yet", remedy="close it"),
        Refusal(what="terminal", where="pid 12 fd 0", why="stays with its user"),
    ]
)


def test_an_error_is_one_line_and_its_status(run: Run, api: SimpleNamespace) -> None:
    api.migrate = raising(REFUSED)
    shown = run("migrate", "12", "b")
    assert (shown.status, shown.out) == (3, "")
    assert shown.err == f"godwit: error: {REFUSED.line()}\n"


def test_an_error_is_an_object_with_json(run: Run, api: SimpleNamespace) -> None:
    api.migrate = raising(REFUSED)
    error = run("migrate", "12", "b", "--json").json["error"]
    assert error["class"] == "RefusedError"
    assert error["exit_status"] == 3
    assert error["survivor"] is None
    assert [each["where"] for each in error["refusals"]] == ["pid 12 fd 3", "pid 12 fd 0"]
    assert error["refusals"][0]["remedy"] == "close it"


def test_a_failed_move_names_the_survivor(run: Run, api: SimpleNamespace) -> None:
    api.migrate = raising(MigrationError("silence", survivor=Survivor.UNDECIDED, remedy="godwit recover"))
    shown = run("migrate", "12", "b", "--json")
    assert shown.status == 9
    assert shown.json["error"]["survivor"] == "undecided"
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("migrate", "12"),
        ("migrate", "0", "b"),
        ("migrate", "-5", "b"),
        ("check", "abc"),
        ("check", "99999999999"),
        ("chek", "12"),
        ("checkpoint", "12"),
        ("migrate", "12", "b", "--timeout", "0"),
        ("receive",),
        ("receive", "--stdio", "--listen", "a:1"),
        ("receive", "--listen", "a:1"),
        ("receive", "--stdio", "--once"),
        ("completion", "tcsh"),
    ],
)
def test_a_wrong_request_is_one_line_with_the_way_to_help(run: Run, words: tuple[str, ...]) -> None:
    shown = run(*words, "--json") if words[0] != "completion" else run(*words)
    assert shown.status == 2
    assert re.fullmatch(r"godwit: error: [^\n]+ --help`\n", shown.err)
    if words[0] != "completion":
        assert shown.json["error"]["class"] == "RequestError"


def test_no_words_show_the_help(run: Run) -> None:
    shown = run()
    assert shown.status == 2
    assert "Commands:" in shown.err


def test_a_bug_says_that_it_is_one(run: Run, api: SimpleNamespace) -> None:
    api.inspect = raising(KeyError("lost"))
    shown = run("check", "12")
    assert shown.status == 70
    assert shown.err.startswith("godwit: bug: KeyError: 'lost'")
    assert "Traceback" not in shown.err
    assert run("check", "12", "--json").json["error"]["exit_status"] == 70


@pytest.mark.parametrize("words", [("--debug", "check", "12"), ("check", "12", "-v")])
def test_a_bug_shows_where_it_arose_when_asked(
    run: Run, api: SimpleNamespace, words: tuple[str, ...]
) -> None:
    api.inspect = raising(KeyError("lost"))
    shown = run(*words)
    assert shown.status == 70
    assert "Traceback" in shown.err


def test_ctrl_c_returns_130(run: Run, api: SimpleNamespace) -> None:
    api.migrate = raising(KeyboardInterrupt())
    assert run("migrate", "12", "b").status == 130


def test_an_error_cannot_forge_lines(run: Run, api: SimpleNamespace) -> None:
    api.inspect = raising(NoProcessError("no \x1b[2J\nprogram \udcff"))
    shown = run("check", "12")
    assert shown.status == 5
    assert shown.err == "godwit: error: no \\x1b[2J\\nprogram \\udcff\n"
    assert "program" in run("check", "12", "--json").json["error"]["message"]


def test_a_reader_that_leaves_is_no_bug() -> None:
    script = "import sys; from godwit.cli.main import main; sys.exit(main(['completion', 'bash']))"
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, stdout=write, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
