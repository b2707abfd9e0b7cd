"""The tests' own promises: a skip is a failure in CI, and what a test leaves behind is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_tests(folder: Path, text: str, *, ci: bool) -> subprocess.CompletedProcess[str]:
    """Run a file of tests under our conftest, in a session of its own."""
    (folder / "test_trial.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = requires: see conftest\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-rA",
        str(folder),
    ]
    environment = {**os.environ, "CI": "true" if ci else "", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


LACKING = """
import pytest
@pytest.mark.requires("command:a-command-nobody-has")
def test_a(): raise AssertionError
@pytest.mark.requires("command:sh", "python:os")
def test_b(): pass
@pytest.mark.xfail
def test_c(): raise AssertionError
"""


def test_a_missing_feature_skips_with_the_reason(tmp_path: Path) -> None:
    run = run_tests(tmp_path, LACKING, ci=False)
    assert "1 passed, 1 skipped, 1 xfailed" in run.stdout
    assert "needs the command a-command-nobody-has" in run.stdout
    assert run.returncode == 0


def test_a_missing_feature_fails_in_ci_with_the_reason(tmp_path: Path) -> None:
    run = run_tests(tmp_path, LACKING, ci=True)
    assert "1 passed, 1 xfailed, 1 error" in run.stdout
    assert "skipped, and CI does not skip: needs the command a-command-nobody-has" in run.stdout
    assert run.returncode == 1


def test_a_module_that_skips_itself_fails_in_ci(tmp_path: Path) -> None:
    run = run_tests(tmp_path, "import pytest\npytest.skip('no', allow_module_level=True)", ci=True)
    assert "skipped, and CI does not skip: no" in run.stdout
    assert run.returncode != 0


LEAVING = """
import pathlib, subprocess
def test_leaves_an_orphan(tmp_path):
    script = 'sleep 300 < /dev/null > /dev/null 2>&1 & echo $! > "$1"'
    subprocess.run(["sh", "-c", script, "sh", "PIDFILE"], check=True)
"""


def test_an_orphan_is_named_with_the_test_that_left_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "orphan"
    run = run_tests(tmp_path, LEAVING.replace("PIDFILE", str(pid_file)), ci=False)
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGKILL)
    assert f"process {pid} (sleep 300), since " in run.stdout
    assert "test_leaves_an_orphan" in run.stdout
    assert run.returncode == 1


def test_a_fixture_wider_than_a_test_may_end_its_processes_itself(tmp_path: Path) -> None:
    text = """
import subprocess, pytest
@pytest.fixture(scope="module")
def wide():
    with subprocess.Popen(["sleep", "300"]) as process:
        yield
        process.kill()
def test_one(wide): pass
def test_two(wide): pass
"""
    run = run_tests(tmp_path, text, ci=True)
    assert "2 passed" in run.stdout
    assert run.returncode == 0


@pytest.mark.parametrize("feature", ["root", "command:sh", "python:os"])
def test_a_feature_that_is_there_is_found(tmp_path: Path, feature: str) -> None:
    if feature == "root" and os.geteuid() != 0:
        feature = "command:true"
    text = f"import pytest\n@pytest.mark.requires({feature!r})\ndef test_a(): pass"
    assert run_tests(tmp_path, text, ci=True).returncode == 0
