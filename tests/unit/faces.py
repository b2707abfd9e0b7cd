"""What the tests of the command line share: its output, and a stand-in for what it calls."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import godwit.api

TRUE_API = godwit.api


@dataclass(slots=True)
class Shown:
    """What a command printed and returned."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401
        (line,) = self.out.splitlines()
        return json.loads(line)


Run = Callable[..., Shown]


class FakeApi(SimpleNamespace):
    """Takes only calls that the true one would take."""

    def __setattr__(self, name: str, function: Callable[..., object]) -> None:
        wanted = inspect.signature(getattr(TRUE_API, name))

        def call(*args: object, **words: object) -> object:
            wanted.bind(*args, **words)
            return function(*args, **words)

        super().__setattr__(name, call)


def raising(error: BaseException) -> Callable[..., object]:
    def call(*_: object, **__: object) -> object:
        raise error

    return call
