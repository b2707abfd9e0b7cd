"""Commit without pause; then ask SQLite and the rows themselves whether anything was lost.

Argument `journal=wal` uses a write-ahead log, which maps a file shared; the default holds POSIX locks only.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
import sys
from contextlib import closing

from life import BadError, Life, check, conclude, nap

ACCOUNTS = 100
EACH = 1000
KEEP_ROWS = 5000


def prepare(database: sqlite3.Connection, journal: str) -> None:
    """Create the tables."""
    (mode,) = database.execute(f"PRAGMA journal_mode={journal}").fetchone()
    check(mode == journal, f"journal mode is {mode}")
    database.execute("CREATE TABLE account(id INTEGER PRIMARY KEY, amount INTEGER NOT NULL)")
    database.execute("CREATE TABLE entry(id INTEGER PRIMARY KEY, link TEXT NOT NULL, filler BLOB)")
    database.executemany("INSERT INTO account VALUES(?, ?)", [(i, EACH) for i in range(ACCOUNTS)])
    database.commit()


def link_after(link: str, number: int) -> str:
    """The next link of the chain of rows."""
    return hashlib.sha256(f"{link} {number}".encode()).hexdigest()


def commit_one(database: sqlite3.Connection, number: int, link: str) -> None:
    """Move money, add a row, drop an old one: all or nothing."""
    source, target = number * 7 % ACCOUNTS, (number * 13 + 1) % ACCOUNTS
    with database:
        database.execute("UPDATE account SET amount = amount - ? WHERE id = ?", (number % 50, source))
        database.execute("UPDATE account SET amount = amount + ? WHERE id = ?", (number % 50, target))
        database.execute("INSERT INTO entry VALUES(?, ?, randomblob(200))", (number, link))
        database.execute("DELETE FROM entry WHERE id <= ?", (number - KEEP_ROWS,))


def verify(number: int, link: str) -> None:
    """Raise unless a fresh connection finds the whole database in order."""
    with closing(sqlite3.connect("data.db")) as database:
        (answer,) = database.execute("PRAGMA integrity_check").fetchone()
        check(answer == "ok", f"integrity_check: {answer}")
        (total,) = database.execute("SELECT sum(amount) FROM account").fetchone()
        check(total == ACCOUNTS * EACH, f"the accounts hold {total}")
        rows = database.execute("SELECT id, link FROM entry ORDER BY id").fetchall()
    check(
        [row[0] for row in rows] == list(range(max(1, number - KEEP_ROWS + 1), number + 1)),
        "rows are missing",
    )
    for (_, before), (follower, after) in itertools.pairwise(rows):
        check(after == link_after(before, follower), f"row {follower} does not follow the one before")
    check(not rows or rows[-1][1] == link, "the last row is not what was committed last")


def work(life: Life) -> str:
    """Commit until told to stop, then verify."""
    journal = "wal" if "journal=wal" in sys.argv else "delete"
    number, link = 0, ""
    try:
        with closing(sqlite3.connect("data.db", timeout=1.0)) as database:
            prepare(database, journal)
            while not life.stopping():
                number += 1
                link = link_after(link, number)
                commit_one(database, number, link)
                (amount,) = database.execute("SELECT link FROM entry WHERE id = ?", (number,)).fetchone()
                check(amount == link, f"row {number} reads back as {amount}")
                life.alive()
                nap(0.001)
        verify(number, link)
    except sqlite3.Error as error:
        raise BadError(f"sqlite: {error}") from error
    return f"{number} commits"


if __name__ == "__main__":
    conclude(Life(sys.argv[1]), work)
