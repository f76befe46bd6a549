"""A failure inside the compiler leaves a script that shows it; broken on purpose here.

The step itself goes on eagerly, with a warning that names the script."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import stq_compile as stq
from models import backward, make_model
from schemas import check
from stq_compile import compiler, failures
from stq_compile.cli import app
from stq_compile.codegen.cpp import backend
from stq_compile.errors import (
    EagerStepWarning,
    InternalError,
    InvalidGraphError,
    KernelBuildError,
    NotCompiledError,
)
from stq_compile.graph_text import parse_graph
from stq_compile.inspection import inspect_optimizer
from stq_compile.options import Options
from stq_compile.passes.runner import Pass
from stq_compile.step_graph import Program, print_graph
from stq_compile.targets import make_optimizer

Break = Callable[[str, Callable[[Program], Program]], None]


@pytest.fixture
def break_pass(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Puts another function in the place of a front pass."""

    def replace(name: str, function: Callable[[Program], Program]) -> None:
        front = tuple(Pass(p.name, function) if p.name == name else p for p in compiler.FRONT)
        monkeypatch.setattr(compiler, "FRONT", front)

    return replace


@pytest.fixture(autouse=True)
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "stq_repro"
    monkeypatch.setattr(failures, "_private_folder", lambda: folder)
    return folder


def divide(_: Program) -> Program:
    raise ZeroDivisionError("a pass that was broken on purpose")


def drop(program: Program) -> Program:
    """Forgets where the results go."""
    return Program(program.optimizer, tuple(u.replace(writes=("param_0",)) for u in program.units))


def train(**options: Any) -> torch.optim.Optimizer:
    model = make_model()
    optimizer = stq.compile(
        torch.optim.AdamW(model.named_parameters(), lr=0.1), min_numel=64, **options
    )
    backward(model, 0)
    optimizer.step()
    return optimizer


def repro(file: Path, *args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["repro", str(file), *args], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("broken", "shown"), [(divide, "ZeroDivisionError: a pass that"), (drop, "InvalidGraphError")]
)
def test_a_broken_pass(
    break_pass: Break,
    monkeypatch: pytest.MonkeyPatch,
    scripts: Path,
    broken: Callable[[Program], Program],
    shown: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context():
        break_pass("ranges", broken)
        with (
            caplog.at_level(logging.ERROR, "stq_compile"),
            pytest.warns(EagerStepWarning, match=shown) as warned,
        ):
            train(precision={"exp_avg": 3, "exp_avg_sq": 4})
        (file,) = scripts.iterdir()
        (message,) = [str(w.message) for w in warned if w.category is EagerStepWarning]
        assert f"stq repro {file}" in message
        (line,) = [r.getMessage() for r in caplog.records if r.name == "stq_compile.failures"]
        assert line.startswith("AdamW: the compiler failed: ")
        code, text, _ = repro(file)
        assert code == 1
        assert f"fails: {shown}" in text
        code, text, _ = repro(file, "--json")
        found = json.loads(text)
        check("repro", found)
        assert (code, found["fails"]) == (1, True)
    monkeypatch.undo()
    code, text, errors = repro(file)
    assert (code, errors) == (0, "")
    assert "compiles" in text


def test_a_script_holds_no_data(break_pass: Break, scripts: Path) -> None:
    break_pass("ranges", divide)
    with pytest.warns(EagerStepWarning):
        train(precision={"exp_avg": 3})
    (file,) = scripts.iterdir()
    text = file.read_text()
    assert "OPTIONS = {'precision': {'exp_avg': 3}, 'min_numel': 64}" in text
    assert "operand('exp_avg_0', 'state', 0, '0.weight', 'exp_avg', (24, 16)" in text
    numbers = {float(x) for x in re.findall(r"(?<![\w.])\d+\.\d+(?:e-?\d+)?", text)}
    model = make_model()
    backward(model, 0)
    values = {
        x
        for p in model.parameters()
        for t in (p.detach(), p.grad)
        if t is not None
        for x in t.flatten().tolist()
    }
    assert not numbers & values


def test_kernels_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch, scripts: Path) -> None:
    """An error of the C++ compiler on our source is a defect; a missing compiler is not."""
    original = backend.emit
    with monkeypatch.context() as patch:
        patch.setattr(backend, "emit", lambda kernel: original(kernel) + "\nthis is no C++\n")
        with pytest.warns(EagerStepWarning, match="KernelBuildError"):
            train(precision=4)
        (file,) = scripts.iterdir()
        assert repro(file)[0] == 1
    assert repro(file)[0] == 0
    missing = KernelBuildError(kernel="k", source="generated C++", output="no compiler")
    assert not failures.is_defect(missing)


def test_a_failure_while_widths_change(monkeypatch: pytest.MonkeyPatch, scripts: Path) -> None:
    """The script has the widths at which it failed."""
    from stq_compile.backend import session_of

    optimizer = train(precision=4)
    session = session_of(optimizer)
    assert session is not None

    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("no such widths")

    monkeypatch.setattr(compiler, "lower", fails)
    with pytest.raises(InternalError, match="no such widths"):
        session.change_widths({(0, "exp_avg"): 3})
    (file,) = scripts.iterdir()
    assert "WIDTHS = {(0, 'exp_avg'): 3}" in file.read_text()
    widths = {r.width for r in stq.report(optimizer).rows if len(r.shape) > 1}
    assert widths == {4}  # all or nothing


def test_a_script_that_cannot_be_written_hides_nothing(
    break_pass: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_pass("ranges", divide)
    monkeypatch.setattr(failures, "_private_folder", lambda: Path("/proc/nowhere"))
    reason = r"ZeroDivisionError[\s\S]*no script .* be written"
    with pytest.warns(EagerStepWarning, match=reason):
        train(precision=4)


def test_inspection_reports_defects_too(
    break_pass: Break, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stq_compile import inspection

    break_pass("ranges", divide)
    monkeypatch.setattr(inspection, "FRONT", compiler.FRONT)
    result = CliRunner().invoke(app, ["facts", "SGD", "--arg", "momentum=0.9"])
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert f"stq repro {scripts}" in result.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ZeroDivisionError(), True),
        (InvalidGraphError(stage="s", reason="r", graph="g"), True),
        (NotCompiledError(optimizer="x"), False),
        (MemoryError(), False),
        (OSError(), False),
    ],
)
def test_what_is_a_defect(error: Exception, expected: bool) -> None:
    assert failures.is_defect(error) is expected


@pytest.mark.parametrize("name", ["AdamW", "RAdam", "Rprop", "Adadelta", "lion_pytorch.Lion"])
def test_a_printed_graph_is_read_back(name: str) -> None:
    found = inspect_optimizer(make_optimizer(name), Options(precision=3))
    for stage in found.stages:
        for unit in stage.program.units:
            text = print_graph(unit.replace(regions={}))
            again = unit.replace(graph=parse_graph(text, unit.name), regions={})
            assert print_graph(again) == text


def test_text_that_is_no_graph() -> None:
    with pytest.raises(ValueError, match="no function 'step'"):
        parse_graph("x = 1", "step")
    with pytest.raises(ValueError, match="line 2: import os is no node"):
        parse_graph("def step():\n    import os\n", "step")
