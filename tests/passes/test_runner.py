"""The runner: order, timing, verification, dumps, stopping early."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from graphs import Sketch, program
from stq_compile.errors import InvalidGraphError
from stq_compile.passes.runner import Pass, run_passes
from stq_compile.step_graph import Program
from zoo import adam, sgd


def renamed(name: str) -> Pass:
    """A pass that appends its name to the name of every unit."""

    def change(given: Program) -> Program:
        units = tuple(u.replace(name=f"{u.name}_{name}") for u in given.units)
        return Program(given.optimizer, units)

    return Pass(name, change)


def slow(given: Program) -> Program:
    time.sleep(0.05)
    return given


def break_writes(given: Program) -> Program:
    return Program(given.optimizer, tuple(u.replace(writes=("nothing",)) for u in given.units))


def fail(given: Program) -> Program:
    raise ZeroDivisionError


def test_every_stage_is_kept_in_order() -> None:
    start = program(sgd())
    stages = run_passes(start, (renamed("a"), renamed("b")))
    assert [s.name for s in stages] == ["input", "a", "b"]
    assert stages[0].program is start
    assert [s.program.units[0].name for s in stages] == ["sgd", "sgd_a", "sgd_a_b"]


def test_passes_are_timed() -> None:
    stages = run_passes(program(sgd()), (Pass("slow", slow), renamed("quick")))
    assert stages[0].seconds == 0.0
    assert stages[1].seconds >= 0.05
    assert stages[2].seconds < 0.05


def test_stop_after_ends_with_that_pass() -> None:
    passes = (renamed("a"), renamed("b"), Pass("fail", fail))
    stages = run_passes(program(sgd()), passes, stop_after="b")
    assert [s.name for s in stages] == ["input", "a", "b"]


def test_stop_after_an_unknown_pass_lists_the_passes() -> None:
    with pytest.raises(ValueError, match=r"no pass 'c'.*\['a', 'b'\]"):
        run_passes(program(sgd()), (renamed("a"), renamed("b")), stop_after="c")


def test_dumps_hold_every_stage_as_printed(tmp_path: Path) -> None:
    folder = tmp_path / "new/folder"
    stages = run_passes(program(sgd(), adam()), (renamed("a"), renamed("b")), dump=folder, first=7)
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ["07_input.py", "08_a.py", "09_b.py"]
    assert [f.read_text() for f in files] == [f"{s.program}\n" for s in stages]


@pytest.mark.parametrize("bad", [Pass("bad", break_writes), Pass("bad", fail)])
def test_dumps_hold_the_stages_before_a_failure(tmp_path: Path, bad: Pass) -> None:
    with pytest.raises((InvalidGraphError, ZeroDivisionError)):
        run_passes(program(sgd()), (renamed("a"), bad), dump=tmp_path)
    assert {"00_input.py", "01_a.py"} <= {f.name for f in tmp_path.iterdir()}


def test_a_failed_verification_names_the_pass_and_shows_the_graph() -> None:
    passes = (renamed("a"), Pass("breaks", break_writes), renamed("b"))
    with pytest.raises(InvalidGraphError, match=r"after pass breaks: .*writes") as error:
        run_passes(program(sgd()), passes)
    assert "def sgd_a(" in str(error.value)


def test_the_input_is_verified_too() -> None:
    s = Sketch()
    s.graph.get_attr("weight")
    with pytest.raises(InvalidGraphError, match="after pass input: a get_attr node"):
        run_passes(program(s.functional({s.param(): s.grad()})), ())
