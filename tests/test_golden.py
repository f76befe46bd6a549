"""The pytest plugin: what its fixture lets pass, and what it fails."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stq_compile.pytest_plugin import Golden

pytest_plugins = ["pytester"]

TEST = """
def test_text(stq_golden):
    stq_golden("one\\ntwo")

def test_none():
    pass
"""
UNCOMPARED = "def test_text(stq_golden):\n    pass\n"
TWICE = "def test_text(stq_golden):\n    stq_golden('one')\n    stq_golden('two')\n"
SAME = """
import pytest

@pytest.mark.parametrize("x", ["a/b", "a_b"])
def test_text(stq_golden, x):
    stq_golden("one")
"""
EXAMPLE = Path(__file__).parents[1] / "examples/pinned_optimizer"


@pytest.fixture
def folder(pytester: pytest.Pytester) -> Path:
    """A folder of tests with one golden."""
    (pytester.path / "test_it.py").write_text(TEST)
    (pytester.path / "stq_goldens/test_it").mkdir(parents=True)
    (pytester.path / "stq_goldens/test_it/test_text.txt").write_bytes(b"one\ntwo\n")
    return pytester.path


@pytest.fixture
def pytest_in(pytester: pytest.Pytester) -> Callable[..., tuple[int, str]]:
    """Runs pytest in pytester's folder: exit code and output."""

    def run(*options: str) -> tuple[int, str]:
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
        return int(result.ret), result.stdout.str() + result.stderr.str()

    return run


Run = Callable[..., tuple[int, str]]


def test_equal_bytes_pass(folder: Path, pytest_in: Run) -> None:
    assert pytest_in()[0] == 0


def test_other_bytes_fail_with_the_difference_and_update_mends_them(
    folder: Path, pytest_in: Run
) -> None:
    file = folder / "stq_goldens/test_it/test_text.txt"
    file.write_bytes(b"one\nthree\n")
    code, output = pytest_in()
    assert code == 1
    assert "-three" in output
    assert "+two" in output
    assert pytest_in("--stq-update")[0] == 0
    assert file.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("found", [b"one\r\ntwo\n", b"one\ntwo", b"one\ntwo\n\n", b"one \ntwo\n"])
def test_nothing_is_normalized_away(folder: Path, pytest_in: Run, found: bytes) -> None:
    (folder / "stq_goldens/test_it/test_text.txt").write_bytes(found)
    assert pytest_in()[0] == 1


def test_a_missing_golden_fails(folder: Path, pytest_in: Run) -> None:
    (folder / "stq_goldens/test_it/test_text.txt").unlink()
    code, output = pytest_in()
    assert code == 1
    assert "no golden" in output


@pytest.mark.parametrize("orphan", ["test_it/test_none.txt", "test_gone/test_text.txt"])
def test_a_golden_that_no_test_owns_fails_the_run(
    folder: Path, pytest_in: Run, orphan: str
) -> None:
    file = folder / "stq_goldens" / orphan
    file.parent.mkdir(exist_ok=True)
    file.write_text("left over")
    code, output = pytest_in("-k", "test_text")
    assert code != 0
    assert orphan in output


@pytest.mark.parametrize(
    ("source", "reason"),
    [(UNCOMPARED, "compares none"), (TWICE, "compared already"), (SAME, "the same golden")],
)
def test_a_fixture_that_is_used_wrongly_fails(
    folder: Path, pytest_in: Run, source: str, reason: str
) -> None:
    (folder / "test_it.py").write_text(source)
    code, output = pytest_in("--stq-update")
    assert code != 0
    assert reason in output


def momentum(lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(100, 60))], lr=lr, momentum=0.9)


def test_graphs_plans_and_kernels(tmp_path: Path) -> None:
    golden = Golden(tmp_path / "test_kinds", update=True)
    golden.step_graph(momentum(), after="fold")
    golden.plan(momentum(), precision=3)
    golden.kernel(momentum(), precision=4)
    written = {f.name: f.read_text() for f in tmp_path.iterdir()}
    assert set(written) == {f"test_kinds.{kind}" for kind in ("graph.txt", "plan.txt", "cpp")}
    assert "momentum_buffer_0.mul_(0.9)" in written["test_kinds.graph.txt"]
    assert written["test_kinds.plan.txt"] == (
        "group0.param0:momentum_buffer 100x60: softsign3, 2350 bytes\n"
    )
    assert "stq::pack<4>" in written["test_kinds.cpp"]
    again = Golden(tmp_path / "test_kinds", update=False)
    again.step_graph(momentum(), after="fold")
    again.plan(momentum(), precision=3)
    with pytest.raises(pytest.fail.Exception, match=r"-.*pack<4>[\s\S]*\+.*pack<5>"):
        again.kernel(momentum(), precision=5)
    other = Golden(tmp_path / "test_kinds", update=False)
    with pytest.raises(pytest.fail.Exception, match=r"alpha=-0\.2"):
        other.step_graph(momentum(lr=0.2), after="fold")
    with pytest.raises(pytest.fail.Exception, match="no pass 'nothing'; the passes are input, "):
        other.step_graph(momentum(), after="nothing")


def test_other_projects_are_left_alone(pytester: pytest.Pytester) -> None:
    """The plugin is loaded wherever stq_compile is installed: it must not be noticed."""
    pytester.makepyfile("import sys\n\ndef test_it():\n    assert 'torch' not in sys.modules\n")
    other = pytester.path / "goldens/test_it/somebody_elses.txt"
    other.parent.mkdir(parents=True)
    other.write_text("x")
    assert pytester.runpytest_subprocess().ret == 0


def test_the_example_fails_readably_when_weight_decay_changes(
    pytester: pytest.Pytester, pytest_in: Run
) -> None:
    project = shutil.copytree(EXAMPLE, pytester.path, dirs_exist_ok=True)
    module = project / "my_optimizer.py"
    text = module.read_text()
    assert "weight_decay=0.1" in text
    module.write_text(text.replace("weight_decay=0.1", "weight_decay=0.2"))
    code, output = pytest_in()
    assert code == 1
    removed, added = "-    mul = torch.ops.aten.mul.Tensor(param_0, 0.99", "0.9998)"
    assert f"{removed}99)" in output
    assert added in output
    assert "adam.py" in output  # the line of the optimizer that it comes from
    assert "Traceback" not in output
    assert "torch.__trace" not in output
    assert "run pytest with --stq-update if it is right" in output
    assert "1 failed, 1 passed" in output  # the plan is what it was
    shown = output.split("short test summary")[0]  # where CI is set, pytest repeats it there
    changes = [line for line in shown.splitlines() if re.match(r"[-+](?![-+])", line)]
    assert len(changes) == 2
