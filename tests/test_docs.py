"""Every command and Python example of the README and of docs/ runs, and prints what is shown."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import stq_compile as stq
from models import backward
from stq_compile.cli import app
from stq_compile.pytest_plugin import Golden
from stq_compile.reporting import run_file
from test_run_report import made_up

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

MODULE = """
import torch
def make_optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(100, 60))], lr=0.1, momentum=0.9)
"""

IN_TEXT = re.compile(r"`((?:make|(?:\.venv/bin/)?python\s+examples)\b[^`]*)`")
"""Commands in running text."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for page in PAGES:
        lines = page.read_text().splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("```")]
        for start, end in zip(starts[::2], starts[1::2], strict=True):
            name = str(page.relative_to(ROOT))
            language = lines[start].removeprefix("```")
            yield Block(name, start + 1, language, "\n".join(lines[start + 1 : end]))


def commands() -> list[tuple[str, str]]:
    """(command, output that is shown of it) of all pages, each once."""
    found: dict[str, str] = {}
    previous: Block | None = None
    for block in blocks():
        if block.language == "sh":
            for line in block.text.splitlines():
                if line.strip():
                    found.setdefault(line.split("  #")[0].strip(), "")
        if block.language == "output":
            assert previous is not None
            assert previous.language == "sh"
            found[previous.text.split("  #")[0].strip()] = block.text
        previous = block
    for page in PAGES:  # in running text
        for command in IN_TEXT.findall(page.read_text()):
            found.setdefault(" ".join(command.split()), "")
    return list(found.items())


COMMANDS = commands()
LONG = ("cuda:", "gpt2", "llama", "vit", "doctor")
"""What takes seconds; other tests run the same verbs on the same subjects by default."""
STQ = [
    pytest.param(c, shown, id=c, marks=[pytest.mark.slow] * any(word in c for word in LONG))
    for c, shown in COMMANDS
    if c.startswith("stq ")
]
MAKE = [c for c, _ in COMMANDS if c.startswith("make ")]
OTHERS = [c for c, _ in COMMANDS if not c.startswith(("stq ", "make ", "pytest"))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: with the files that they name."""
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "shapes.json").write_text('{"a.weight": [64, 128]}')
    run_file.save(made_up(), tmp_path / "run.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "shown"), STQ)
def test_stq(command: str, shown: str, folder: Path) -> None:
    arguments = shlex.split(command)[1:]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    printed = iter(line.rstrip() for line in result.stdout.splitlines())
    for line in shown.splitlines():
        expected = line.rstrip()
        if expected.endswith("..."):
            assert any(p.startswith(expected.removesuffix("...")) for p in printed), line
        else:
            assert expected in printed, line  # in this order, with others between


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command: str) -> None:
    """Running them is what the whole test suite, CI and the demo are for."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = [w for w in command.split()[1:] if "=" not in w]
    assert words
    assert set(words) <= set(targets)


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_examples_have_the_options_that_are_shown(command: str) -> None:
    """They train for minutes or hours; tests/test_examples.py and others run them briefly."""
    script, *words = shlex.split(command)[1:]
    flags = [word for word in words if word.startswith("--")]
    text = (ROOT / script).read_text()
    if flags:
        assert "ArgumentParser" in text or "commandline" in text
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert all(flag in done.stdout for flag in flags)


PYTHON = [b for b in blocks() if b.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=[f"{b.page}:{b.line}" for b in PYTHON])
def test_python(block: Block, folder: Path) -> None:
    model = torch.nn.Sequential(
        *(torch.nn.Linear(a, b) for a, b in ((16, 300), (300, 300), (300, 8)))
    )

    def make_optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.named_parameters(), lr=3e-4)

    def train_step(step: int) -> float:
        backward(model, step)
        return 1.0

    names: dict[str, Any] = {
        "torch": torch, "stq": stq, "model": model, "optimizer": make_optimizer(),
        "make_optimizer": make_optimizer, "batches": range(2), "train_step": train_step,
    }  # fmt: skip
    backward(model, 0)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), names)
    if "def test_" in block.text:
        for name in [n for n in names if n.startswith("test_")]:
            golden = Golden(folder / name, update=True)
            names[name](golden)
            assert golden.compared
