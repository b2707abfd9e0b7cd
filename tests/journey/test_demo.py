from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from godwit.lab import state
from tests.conftest import requires

pytestmark = requires("root")

SOURCE = Path(__file__).resolve().parents[2] / "src"
DEADLINE_S = 60


@contextmanager
def demo(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    argv = [sys.executable, "-P", "-m", "godwit.cli.main", "demo", *options]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def run_demo(*options: str, search: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": f"{SOURCE}:{search}"}
    argv = [sys.executable, "-P", "-m", "godwit.cli.main", "demo", *options]
    return subprocess.run(argv, env=env, capture_output=True, timeout=DEADLINE_S, check=False)


def lab_is_up(process: subprocess.Popen[bytes]) -> bool:
    return state.read(f"demo-{process.pid}") is not None


def next_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], DEADLINE_S)[0], "it says nothing"
    return process.stdout.readline()


@pytest.mark.parametrize("blind", [False, True], ids=["numpy", "without numpy"])
def test_the_demo_proves_that_nothing_was_lost(tmp_path: Path, blind: bool) -> None:
    if blind:
        (tmp_path / "sitecustomize.py").write_text(
            "import importlib.util as u\nfind = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'numpy' else find(name, *a)\n"
        )
    done = run_demo("--lines", "40", "--json", search=str(tmp_path))
    assert done.returncode == 0, (done.stdout, done.stderr)
    shown = json.loads(done.stdout)
    assert shown["proven"]
    assert shown["program"] == ("plain" if blind else "numpy")
    assert [(hop["source"], hop["destination"]) for hop in shown["hops"]] == [
        ("a", "b"),
        ("b", "c"),
        ("c", "a"),
    ]
    assert {hop["survivor"] for hop in shown["hops"]} == {"destination"}
    assert {hop["processes"] for hop in shown["hops"]} == {2}
    assert shown["lines"] > 4 * 40
    # What the program could notice is at least what we say it was frozen for.
    assert all(hop["gap_ms"] >= hop["freeze_ms"] * 0.9 for hop in shown["hops"])
    assert [record.name for record in state.living() if record.name.startswith("demo-")] == []


def test_a_killed_demo_leaves_no_lab() -> None:
    with demo() as process:
        while b"is on node a" not in next_line(process):
            pass
        assert lab_is_up(process)
        # Held by the demo, the guard, and nobody else: it ends when both have.
        assert process.stderr is not None
        process.kill()
        assert select.select([process.stderr], [], [], DEADLINE_S)[0], "the guard did not end"
        assert process.stderr.read() == b""
        assert not lab_is_up(process)


def test_a_failed_move_fails_the_demo() -> None:
    # A node has a /tmp of its own, so the module that makes each mover die lies elsewhere.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory, "sitecustomize.py").write_text(
            "import sys\nif 'migrate' in sys.orig_argv: raise SystemExit('no wings')\n"
        )
        done = run_demo("--lines", "1", "--json", search=directory)
    assert done.returncode == 9, (done.stdout, done.stderr)
    error = json.loads(done.stdout)["error"]
    assert "no wings" in error["message"]
    assert error["survivor"] == "undecided"
