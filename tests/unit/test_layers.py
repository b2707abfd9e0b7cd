"""The shape of the source: what `docs/STYLE.md` says and neither linter nor type checker can see."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "godwit"

# From the bottom up, as in docs/STYLE.md. A line may import the lines before it; modules that share a
# line are strangers to each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("types",),
    ("errors", "log"),
    ("linux",),
    ("images", "wire", "procfs"),
    ("tracee",),
    ("resources", "residual"),
    ("engine",),
    ("migrate",),
    ("keeper",),
    ("agent",),
    ("lab",),
    ("api",),
    ("cli", "web"),
)
HEIGHT = {name: height for height, line in enumerate(LAYERS) for name in line}
# The package itself and `python -m godwit` are doors to everything; only `__version__` may be taken from it.
DOORS = frozenset({"__init__", "__main__"})
# The command line must be there in 150 ms, so these wait until somebody needs them.
HEAVY = frozenset({"asyncio", "cryptography", "rich", "ssl"})
# Imported lazily as a whole: there is nothing in it for who does not need the library.
LAZY_MODULES = frozenset({"migrate.tlspipe"})
LIGHT_LAYERS = frozenset({"api", "cli", "migrate"})

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name, with where it stands."""

    module: str  # dotted, absolute
    line: int
    at_import_time: bool  # false inside a function or under TYPE_CHECKING


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One source file."""

    name: str  # dotted, below godwit: "resources.pipe"
    tree: ast.Module
    lines: int

    @property
    def layer(self) -> str:
        return self.name.partition(".")[0]


def parse(name: str, text: str) -> Module:
    return Module(name=name, tree=ast.parse(text), lines=len(text.splitlines()))


def source_modules() -> Iterator[Module]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        yield parse(".".join(parts), path.read_text())


def is_package(module: Module) -> bool:
    return module.name == "__init__" or (SOURCE / module.name.replace(".", "/")).is_dir()


def imported_from(module: Module, node: ast.ImportFrom) -> Iterator[str]:
    """Yield the absolute name of all that a `from` statement takes, submodule or not."""
    base = node.module or ""
    if node.level:
        package = ["godwit", *(module.name.split(".") if module.name != "__init__" else [])]
        up = node.level - 1 if is_package(module) else node.level
        parents = package[: len(package) - up]
        base = ".".join([*parents, base] if base else parents)
    for alias in node.names:
        yield f"{base}.{alias.name}"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(module: Module) -> Iterator[Import]:
    """Yield every import of a module, also those inside functions."""

    def walk(node: ast.AST, *, now: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module=alias.name, line=child.lineno, at_import_time=now)
            elif isinstance(child, ast.ImportFrom):
                for name in imported_from(module, child):
                    yield Import(module=name, line=child.lineno, at_import_time=now)
            else:
                later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(child)
                yield from walk(child, now=now and not later)

    yield from walk(module.tree, now=True)


def import_faults(module: Module) -> list[str]:
    """Say which imports of a module do not point down."""
    if module.layer in DOORS:
        return []
    faults: list[str] = []
    for imported in imports(module):
        package, _, rest = imported.module.partition(".")
        target = rest.partition(".")[0]
        if package != "godwit" or target in {module.layer, "__version__"}:
            continue
        where = f"{module.name}:{imported.line}: imports {imported.module}"
        if target not in HEIGHT:
            faults.append(f"{where}, which is in no layer")
        elif HEIGHT[target] >= HEIGHT[module.layer]:
            faults.append(f"{where}, which is not below {module.layer}")
    return faults


def _is_heavy(name: str) -> bool:
    return name.partition(".")[0] in HEAVY or name.removeprefix("godwit.") in LAZY_MODULES


def heavy_imports(module: Module) -> list[str]:
    if module.layer not in DOORS | LIGHT_LAYERS or module.name in LAZY_MODULES:
        return []
    return [
        f"{module.name}:{imported.line}: imports {imported.module} at start-up"
        for imported in imports(module)
        if imported.at_import_time and _is_heavy(imported.module)
    ]


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body, f"{prefix}{node.name}.")


def undocumented(module: Module) -> list[str]:
    missing = [] if ast.get_docstring(module.tree) else [module.name]
    for name, node in public_definitions(module.tree.body):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        overload = any("overload" in ast.dump(decorator) for decorator in node.decorator_list)
        if not ast.get_docstring(node) and not overload:
            missing.append(f"{module.name}:{node.lineno}: {name}")
    return missing


def too_long(module: Module) -> list[str]:
    faults = [f"{module.name}: {module.lines} lines"] if module.lines > MAX_FILE_LINES else []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{module.name}:{node.lineno}: {node.name} has {length} lines")
    return faults


def test_every_module_has_a_layer() -> None:
    names = {module.layer for module in source_modules()} - DOORS
    assert sorted(names - HEIGHT.keys()) == []


def test_the_style_guide_draws_the_same_layers() -> None:
    guide = (ROOT / "docs" / "STYLE.md").read_text()
    drawing = guide.partition("## Layers")[2].partition("`linux` up to `engine`")[0]
    lines = [line.split() for line in drawing.splitlines() if line.startswith("    ")]
    drawn = [list(itertools.takewhile(HEIGHT.__contains__, words)) for words in lines]
    assert sorted(itertools.chain.from_iterable(drawn)) == sorted(HEIGHT)
    tops = [max(HEIGHT[name] for name in names) for names in drawn]
    assert tops == sorted(tops, reverse=True)


def test_imports_point_only_down() -> None:
    assert [fault for module in source_modules() for fault in import_faults(module)] == []


def test_resources_and_residual_never_import_each_other() -> None:
    meetings = [
        f"{module.name}:{imported.line}"
        for module in source_modules()
        for imported in imports(module)
        for one, other in (("resources", "residual"), ("residual", "resources"))
        if module.layer == one and f"{imported.module}.".startswith(f"godwit.{other}.")
    ]
    assert meetings == []


def test_only_linux_knows_ctypes() -> None:
    strangers = [
        f"{module.name}:{imported.line}"
        for module in source_modules()
        for imported in imports(module)
        if imported.module.partition(".")[0] == "ctypes" and module.layer != "linux"
    ]
    assert strangers == []


def test_the_command_line_starts_without_heavy_libraries() -> None:
    assert [fault for module in source_modules() for fault in heavy_imports(module)] == []


def test_everything_public_says_what_it_does() -> None:
    assert [name for module in source_modules() for name in undocumented(module)] == []


def test_files_and_functions_fit_into_a_head() -> None:
    assert [fault for module in source_modules() for fault in too_long(module)] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("linux.mem", "from godwit.procfs import maps"),
        ("linux.mem", "import godwit.engine.plan"),
        ("linux.mem", "def f():\n    from godwit import tracee"),
        ("resources.pipe", "from godwit import residual"),
        ("residual.tty", "from godwit.resources.pipe import PipeEntry"),
        ("images.codec", "from godwit.wire import frames"),
        ("log", "from .errors import GodwitError"),
        ("resources.pipe", "from ..engine import plan"),
        ("cli.main", "from godwit.nowhere import something"),
    ],
)
def test_an_import_that_does_not_point_down_is_found(name: str, text: str) -> None:
    assert len(import_faults(parse(name, text))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("engine.plan", "from godwit.resources import registry\nfrom godwit.types import Pid"),
        ("engine.plan", "from . import inspect\nfrom ..errors import GodwitError"),
        ("cli.main", "from godwit import __version__"),
        ("linux.mem", "import os, struct"),
        ("__init__", "from godwit.migrate import migrate"),
    ],
)
def test_an_import_that_points_down_is_left_alone(name: str, text: str) -> None:
    assert import_faults(parse(name, text)) == []


def test_a_heavy_import_is_found_at_the_top_and_allowed_inside() -> None:
    assert len(heavy_imports(parse("cli.main", "from rich.table import Table"))) == 1
    assert heavy_imports(parse("cli.main", "def f():\n    from rich.table import Table")) == []
    assert heavy_imports(parse("cli.main", "if TYPE_CHECKING:\n    import ssl")) == []
    assert heavy_imports(parse("lab.certificates", "import ssl")) == []
    assert heavy_imports(parse("migrate.tlspipe", "import ssl")) == []
    assert len(heavy_imports(parse("migrate.source", "import godwit.migrate.tlspipe"))) == 1


def test_a_missing_docstring_is_found() -> None:
    text = '"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...'
    assert undocumented(parse("log", text)) == ["log:4: A.f", "log:6: h"]


def test_a_long_function_is_found() -> None:
    text = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert too_long(parse("log", text)) == [f"log:1: f has {MAX_FUNCTION_LINES + 1} lines"]
