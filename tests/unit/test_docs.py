"""The pages say what the code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from godwit import errors

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


def error_classes(root: type[errors.GodwitError]) -> Iterator[type[errors.GodwitError]]:
    yield root
    for heir in root.__subclasses__():
        yield from error_classes(heir)


def pages() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    yield from (ROOT / "docs").rglob("*.md")


def test_every_error_stands_in_the_table_with_its_exit_status() -> None:
    lines = (ROOT / "docs" / "errors.md").read_text().splitlines()
    rows = [line.split("|")[1:3] for line in lines if "|" in line]
    told = {name: status.strip() for status, names in rows for name in re.findall(r"`(\w+)`", names)}
    ours = [kind for kind in error_classes(errors.GodwitError) if kind.__module__ == errors.__name__]
    assert {kind.__name__: told.get(kind.__name__) for kind in ours} == {
        kind.__name__: str(kind.exit_status) for kind in ours
    }


def test_every_survivor_is_explained() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    assert [survivor.value for survivor in errors.Survivor if f"| `{survivor.value}` |" not in text] == []


def test_no_page_links_to_nowhere() -> None:
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages()
        for target in LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert dead == []


def test_the_dependencies_page_names_each_dependency_with_its_range() -> None:
    page = (ROOT / "docs" / "decisions" / "0001-dependencies.md").read_text()
    block = re.search(
        r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    assert block is not None
    wanted = re.findall(r'"([a-z0-9]+)([^"]*)"', block[1])
    assert len(wanted) >= 5
    assert [name + bounds for name, bounds in wanted if f"| {name} | `{bounds}` |" not in page] == []
