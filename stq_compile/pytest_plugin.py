"""The pytest plugin: pins the compiled form of an optimizer in files beside the tests.

    def test_step(stq_golden):
        stq_golden.step_graph(make_optimizer())

compares the printed step graph with ``stq_goldens/<module>/<test>.graph.txt`` next to the test,
byte for byte. ``pytest --stq-update`` writes the files anew. A golden that no test compares fails
the run, and so does a test that asks for the fixture and compares nothing.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from stq_compile.inspection import Inspection

FOLDER = "stq_goldens"
OPTION = "--stq-update"
FIXTURE = "stq_golden"


class Golden:
    """The goldens of one test; each method compares one, and a test may call several."""

    def __init__(self, stem: Path, update: bool) -> None:
        self.stem = stem
        self.update = update
        self.compared: set[Path] = set()

    def __call__(self, text: str, suffix: str = ".txt") -> None:
        """Compare any text with the test's file of that suffix, byte for byte.

        (The file ends with one newline more than the text.)
        """
        file = self.stem.with_name(self.stem.name + suffix)
        if file in self.compared:
            pytest.fail(f"{file} was compared already; give the second one another suffix")
        self.compared.add(file)
        found = f"{text}\n".encode()
        if self.update:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(found)
            return
        if not file.exists():
            pytest.fail(f"no golden {file}; run pytest with {OPTION}", pytrace=False)
        if file.read_bytes() != found:
            pytest.fail(
                f"{difference(file, found)}\nrun pytest with {OPTION} if it is right", pytrace=False
            )

    def step_graph(self, optimizer: Optimizer, after: str = "recurrences", **options: Any) -> None:
        """Compare the step graphs of an optimizer after a pass, as Python.

        Args:
            optimizer: is not compiled, but gets gradients and states.
            after: a pass as `stq passes` lists them; formats come with ``quantize``.
            **options: of `stq_compile.compile`.
        """
        found = _inspect(optimizer, options)
        if found.refused is not None:
            raise found.refused
        stages = {stage.name: str(stage.program) for stage in found.stages}
        if after not in stages:
            pytest.fail(f"no pass {after!r}; the passes are {', '.join(stages)}")
        self(stages[after], ".graph.txt")

    def plan(self, optimizer: Optimizer, **options: Any) -> None:
        """Compare the first formats of all states, and their bytes."""
        states = _inspect(optimizer, options).states()
        rows = [
            f"{o.source} {'x'.join(map(str, o.shape)) or 'scalar'}: {format.name}, "
            f"{format.nbytes(math.prod(o.shape))} bytes"
            for o, format in states
        ]
        self("\n".join(rows), ".plan.txt")

    def kernel(self, optimizer: Optimizer, target: str = "cpu", **options: Any) -> None:
        """Compare the source of all kernels: C++ for ``cpu``, Triton for ``cuda:90`` and others."""
        from stq_compile.codegen.target import parse_target

        machine = parse_target(target)
        rows = _inspect(optimizer, options).kernels(machine)
        self(
            "\n\n".join(row["source"] for row in rows), ".triton.txt" if machine.is_gpu else ".cpp"
        )


def _inspect(optimizer: Optimizer, options: dict[str, Any]) -> Inspection:
    from stq_compile.inspection import inspect_optimizer
    from stq_compile.options import Options

    with _quiet():
        return inspect_optimizer(optimizer, Options.from_dict(options))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's trace of every capture out of what pytest shows of a failure.

    It is meant for TORCH_TRACE, whose handler is torch's own and stays.
    """
    trace = logging.getLogger("torch.__trace")
    handlers = trace.handlers
    trace.handlers = [h for h in handlers if type(h).__module__.startswith("torch")]
    try:
        yield
    finally:
        trace.handlers = handlers


def difference(file: Path, found: bytes) -> str:
    """What changed, as a unified diff."""
    old, new = (b.decode().splitlines() for b in (file.read_bytes(), found))
    lines = difflib.unified_diff(old, new, str(file), "this run", lineterm="")
    return "\n".join(lines) or f"{file}: the bytes differ, the lines do not"


@pytest.fixture
def stq_golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    """Compares a step graph, a plan, a kernel or any text with a file beside the test."""
    golden = Golden(stem_of(request.node), request.config.getoption(OPTION))
    yield golden
    if not golden.compared:
        pytest.fail(f"{request.node.name} asks for a golden and compares none", pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("stq_compile").addoption(
        OPTION, action="store_true", help="write the golden files of stq_compile anew"
    )


@pytest.hookimpl(tryfirst=True)  # before -k and -m take tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fail the run for a golden that no collected test owns."""
    owners = Counter(stem_of(i) for i in items if FIXTURE in getattr(i, "fixturenames", ()))
    shared = [str(stem) for stem, count in owners.items() if count > 1]
    if shared:
        raise pytest.UsageError(f"several tests have the same golden; rename them: {shared}")
    if any("::" in argument for argument in config.args):
        return  # modules are collected in part
    modules = {item.path for item in items}
    unused = [
        str(file)
        for folder in sorted({path.parent / FOLDER for path in modules})
        for file in sorted(folder.glob("*/*"))
        if _is_judged(file, modules) and not any(_owns(stem, file) for stem in owners)
    ]
    if unused:
        raise pytest.UsageError(f"no test compares these goldens; delete them: {unused}")


def _is_judged(file: Path, modules: set[Path]) -> bool:
    """Whether the module of a golden was collected, or is there no more."""
    module = file.parents[2] / f"{file.parent.name}.py"
    return module in modules or not module.exists()


def _owns(stem: Path, file: Path) -> bool:
    return file.parent == stem.parent and file.name.startswith(f"{stem.name}.")


def stem_of(item: pytest.Item) -> Path:
    """``stq_goldens/<module>/<test>``: the test's path within its module, as a file name."""
    inside = item.nodeid.partition("::")[2]
    name = re.sub(r"[^\w-]+", "_", inside).strip("_")
    return item.path.parent / FOLDER / item.path.stem / name
