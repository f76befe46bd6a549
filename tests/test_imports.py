"""Imports point one way: a module imports only from its own layer or from an earlier one."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# From bottom to top, one line a layer; names are below `stq_compile`, and `a.*` stands for all of a
# subpackage that no other line names. Modules of one layer may import each other without a cycle.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "printable"),
    ("architectures", "attributes", "dump", "dynamo", "interrupts"),
    ("formats", "halves", "layout", "rounding", "matrices", "reference"),
    ("options",),
    ("storage",),
    ("packed_state", "state_tree"),
    ("shards",),
    ("error_law",),
    ("birth", "ops", "working_set"),
    ("step_graph",),
    ("capture",),
    ("exemplars",),
    ("passes", "passes.*"),
    ("codegen", "codegen.*"),
    ("planner", "planner.*"),
    ("compiler", "formulas", "kernels"),
    ("checks", "codec", "collective", "failures", "graph_text", "runtime"),
    ("half_params", "nonfinite"),
    ("regions",),
    ("cut_regions",),
    ("compiled_step",),
    ("reporting", "reporting.*"),
    ("session",),
    ("repro", "saved_state", "shard_blocks"),
    ("checkpoint", "copies", "dcp", "eager"),
    ("backend", "state_report"),
    ("closures", "steps", "symbolic_math"),
    ("driver",),
    ("api",),
    ("",),  # stq_compile/__init__.py, which imports nothing until it is asked
    ("targets",),
    ("inspection",),
    ("benchmarks", "benchmarks.*", "doctor", "memory"),
    ("cli", "cli.*", "pytest_plugin"),
)

LAZY = ("cli.*", "pytest_plugin")
"""Modules that import what is slow when it is needed: ``stq --help``, and every pytest run."""

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "stq_compile": "stq_compile",
    "stq_compile.passes": "passes",
    "stq_compile.codegen": "codegen",
}
NOT_OURS = {".venv", ".types", "build", "dist", "out"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and where the statement stands."""

    target: str
    line: int
    local: bool  # inside a function


def test_every_module_has_a_layer() -> None:
    missing = sorted(module for module in _sources() if _layer(module) is None)
    assert not missing, f"add to LAYERS in {__file__}: {missing}"


def test_every_entry_of_the_table_has_a_module() -> None:
    modules = [_short(module) for module in _sources()]
    entries = [entry for layer in LAYERS for entry in layer]
    unused = [e for e in entries if not any(fnmatchcase(module, e) for module in modules)]
    assert not unused, f"remove from LAYERS in {__file__}: {unused}"
    assert len(entries) == len(set(entries))


def test_imports_point_one_way() -> None:
    assert not list(_violations(_sources()))


def test_no_bare_import_of_passes_or_codegen() -> None:
    """It would make a second copy of the module, with a second copy of every registry."""
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in ROOT.rglob("*.py")
        if not NOT_OURS.intersection(file.relative_to(ROOT).parts)
        for line in _bare_imports(file.read_text())
    ]
    assert not found, f"import it as stq_compile.passes or stq_compile.codegen: {found}"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"errors": "from stq_compile import options", "options": ""}, "later layer"),
        ({"errors": "import stq_compile.options", "options": ""}, "later layer"),
        ({"errors": "from .options import Options", "options": ""}, "later layer"),
        ({"errors": "if TYPE_CHECKING:\n  from .options import O", "options": ""}, "later layer"),
        ({"options": "from stq_compile.runtime import Table", "runtime": ""}, "later layer"),
        ({"passes.fold": "from ..session import Session", "session": ""}, "later layer"),
        ({"options": "def f():\n  from .errors import E", "errors": ""}, "in a function"),
        ({"options": "class A:\n  def f(self):\n    import stq_compile.errors"}, "in a function"),
        ({"passes.a": "from . import b", "passes.b": "from .a import f"}, "cycle"),
        ({"nowhere": "from . import errors", "errors": ""}, "no layer"),
        ({"options": "from . import nowhere", "nowhere": ""}, "no layer"),
    ],
)
def test_the_check_sees_violations(sources: dict[str, str], message: str) -> None:
    found = list(_violations(_as_package(sources)))
    assert found
    assert all(message in violation for violation in found), found


def test_the_check_allows_earlier_layers() -> None:
    sources = {
        "errors": "import torch",
        "options": "from stq_compile import errors\nfrom stq_compile.errors import E",
        "passes": "from .fold import fold",
        "passes.fold": "from ..errors import E\nfrom stq_compile.options import O",
        "session": "from .passes import fold",
    }
    assert not list(_violations(_as_package(sources)))


def test_bare_imports_are_seen() -> None:
    for source in ("import passes", "import codegen.cpp as c", "from passes.fold import fold"):
        assert list(_bare_imports(source)) == [1], source
    assert not list(_bare_imports("from . import passes\nfrom stq_compile import codegen"))


def _as_package(sources: Mapping[str, str]) -> dict[str, str]:
    return {"stq_compile": ""} | {f"stq_compile.{name}": code for name, code in sources.items()}


def _sources() -> dict[str, str]:
    """The source of every module of the package, by the module's full name."""
    sources = {}
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            sources[".".join((package, *parts))] = file.read_text()
    return sources


def _violations(sources: Mapping[str, str]) -> Iterator[str]:
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for found in _imports(module, source, sources):
            where = f"{module}:{found.line} imports {found.target}"
            layer, target_layer = _layer(module), _layer(found.target)
            if found.target != module:
                graph[module].add(found.target)
            if found.local and not any(fnmatchcase(_short(module), entry) for entry in LAZY):
                yield f"{where} in a function"
            elif layer is None or target_layer is None:
                yield f"{where}: one of them has no layer"
            elif target_layer > layer:
                yield f"{where}, which is in a later layer"
                graph[module].discard(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"a cycle of imports: {error.args[1]}"


def _imports(module: str, source: str, sources: Mapping[str, str]) -> Iterator[Import]:
    """The modules of this package that `source` imports."""
    tree = ast.parse(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    local = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, functions)
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node, sources)
            # A name is a submodule where there is one, and else something that `base` holds.
            full = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in sources else base for name in full]
        else:
            continue
        for name in names:
            if name == "stq_compile" or name.startswith("stq_compile."):
                yield Import(name, node.lineno, id(node) in local)


def _base(module: str, node: ast.ImportFrom, sources: Mapping[str, str]) -> str:
    """The full name of what stands between `from` and `import`."""
    if node.level == 0:
        return node.module or ""
    is_package = any(name.startswith(module + ".") for name in sources)
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join((*parts, node.module) if node.module else parts)


def _layer(module: str) -> int | None:
    """The layer that names `module`, and else the one whose pattern matches it."""
    name = _short(module)
    for matches in (str.__eq__, fnmatchcase):
        for index, layer in enumerate(LAYERS):
            if any(matches(name, entry) for entry in layer):
                return index
    return None


def _short(module: str) -> str:
    return module.removeprefix("stq_compile").removeprefix(".")


def _bare_imports(source: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        if any(name.split(".")[0] in ("passes", "codegen") for name in names):
            yield node.lineno
