"""What is logged, and what ``STQ_DUMP`` writes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

import stq_compile as stq
from models import backward, make_model


def train(steps: int) -> None:
    model = make_model()
    optimizer = stq.compile(torch.optim.AdamW(model.parameters()), min_numel=64, interval=2)
    for step in range(steps):
        backward(model, step)
        optimizer.step()


def test_one_line_an_event(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "stq_compile"):
        train(4)
    ours = [r for r in caplog.records if r.name.startswith("stq_compile.")]
    assert all("\n" not in r.getMessage() for r in ours)
    info = [r.getMessage() for r in ours if r.levelno == logging.INFO]
    assert sum("AdamW: compiled 1 templates" in text for text in info) == 1
    assert sum("AdamW: step 2, " in text for text in info) == 1
    assert sum("AdamW: step 4, " in text for text in info) == 1
    debug = [r.getMessage() for r in ours if r.name == "stq_compile.passes.runner"]
    assert any(text.startswith("pass quantize: ") for text in debug)


def test_quiet_by_default_and_turned_on_as_torchs_own_logs_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    train(1)
    assert capfd.readouterr() == ("", "")
    torch._logging.set_logs(modules={"stq_compile": logging.INFO})  # TORCH_LOGS=stq_compile
    try:
        train(1)
    finally:
        torch._logging.set_logs()
    found = capfd.readouterr().err  # as many kernels as the plan has pairs of widths
    assert re.search(r"AdamW: compiled 1 templates to \d kernels", found)


def test_every_stage_of_a_compile_is_dumped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STQ_DUMP", str(tmp_path / "dump"))
    train(2)
    (folder,) = (tmp_path / "dump").iterdir()
    assert folder.name.startswith("AdamW-")
    runs = sorted(f.name for f in folder.iterdir())
    assert runs[:2] == ["000_analyse", "001_generate"]
    assert {"002_measure", "003_generate_measuring"} <= set(runs)
    stages = sorted(f.name for f in (folder / "000_analyse").iterdir())
    assert stages[0] == "00_input.py"
    assert stages[-1].endswith("_recurrences.py")
    kernels = list((folder / "001_generate").glob("*.cpp"))
    assert kernels
    assert "extern" in kernels[0].read_text()
