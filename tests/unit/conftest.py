"""The command line, called in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import godwit.api
from godwit.cli.main import main
from godwit.log import log
from tests.unit.faces import FakeApi, Run, Shown


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    def call(*words: str) -> Shown:
        status = main(words)
        out, err = capsys.readouterr()
        return Shown(status, out, err)

    yield call
    # The handler holds this test's standard error.
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for `godwit.api`; each test puts in what is called."""
    fake = FakeApi()
    monkeypatch.setattr(godwit, "api", fake)
    return fake
