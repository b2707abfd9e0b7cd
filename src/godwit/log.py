"""Logging: facts with numbers, on standard error, quiet unless asked.

`with bound(migration=ident):` puts the fields on every line logged under it.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator

_fields: contextvars.ContextVar[tuple[tuple[str, str], ...]] = contextvars.ContextVar("fields", default=())

log = logging.getLogger("godwit")


class _FieldFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields.get())
        line = super().format(record)
        return f"{line} [{fields}]" if fields else line


@contextlib.contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Put `fields` on every line logged inside the block."""
    token = _fields.set((*_fields.get(), *((name, str(value)) for name, value in fields.items())))
    try:
        yield
    finally:
        _fields.reset(token)


def to_stderr(level: int) -> None:
    """Send the log from `level` up to standard error. Called once, by the command line."""
    handler = logging.StreamHandler()
    handler.setFormatter(_FieldFormatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(level)
