"""The ``stq`` command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stq_compile.cli import app

SOURCE = """
import torch
def make():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(100, 60))], lr=0.1, momentum=0.9)
def wrong():
    return 3
"""


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, args)
    return result.exit_code, result.output


@pytest.fixture
def target(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    return str(file)


def test_trace_shows_roles_and_lines(target: str) -> None:
    code, text = run("trace", "torch.optim.AdamW")
    assert code == 0
    assert "state  float32[128, 64] group0.param0:exp_avg_sq" in text
    assert "adam.py:" in text


def test_passes_and_show() -> None:
    code, text = run("passes", "AdamW", "--json")
    assert code == 0
    names = [row["name"] for row in json.loads(text)["passes"]]
    assert names[0] == "input"
    assert names[-1] == "partition"
    code, text = run("show", "AdamW", "--after", "quantize", "--precision", "3", "--json")
    assert code == 0
    assert "torch.ops.stq.quantize" in json.loads(text)["graph"]
    assert "midrise3" in json.loads(text)["graph"]


def test_kernels_of_a_file(target: str) -> None:
    code, text = run("kernels", f"{target}:make", "--json")
    assert code == 0
    (kernel,) = json.loads(text)["kernels"]
    assert kernel["target"] == "cpu"
    assert "stq::pack<4>" in kernel["source"]
    assert kernel["bytes_per_param"] == 13.03125  # p twice, g, codes twice, scales twice


def test_kernels_for_a_gpu_that_is_not_here(target: str) -> None:
    code, text = run("kernels", f"{target}:make", "--target", "cuda:90", "--json")
    assert code == 0, text
    (kernel,) = json.loads(text)["kernels"]
    assert (kernel["target"], kernel["widths"]) == ("cuda:90", {"momentum_buffer_0": 4})
    assert kernel["template"] == "template_0"
    assert 0 < kernel["registers"] <= 128
    assert (kernel["spill_bytes"], kernel["shared_bytes"], kernel["barriers"]) == (0, 0, 0)
    assert kernel["bytes_per_param"] == 13.0312
    assert "def update(" in kernel["source"]
    code, text = run("kernels", f"{target}:make", "--target", "cuda:60")
    assert code == 2
    assert "the targets are cpu, cuda:80" in text


def test_facts() -> None:
    code, text = run("facts", "RMSprop", "--json")
    assert code == 0
    (square,) = json.loads(text)["facts"]
    assert square["state"] == "square_avg"
    assert square["sign"] == ">= 0"
    assert square["kind"] == "average"
    assert square["amplification"] == "50.25"
    code, text = run("facts", "AdamW")
    assert code == 0
    assert "exp_avg_sq" in text


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("trace", "Adamm"), "no such optimizer"),
        (("trace", "nowhere:make"), "No module named"),
        (("trace", "{target}:wrong"), "returns a int"),
        (("trace", "{target}:missing"), "no attribute"),
        (("show", "SGD", "--after", "nothing"), "no such pass"),
        (("kernels", "LBFGS"), "line search"),
    ],
)
def test_bad_targets_are_one_line_and_exit_2(
    args: tuple[str, ...], reason: str, target: str
) -> None:
    code, text = run(*(a.format(target=target) for a in args))
    assert code == 2
    assert reason in text
    assert len(text.strip().splitlines()) == 1
