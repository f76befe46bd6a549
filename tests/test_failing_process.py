"""Processes that are killed: the others end with torch's error, and the last checkpoint loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from processes import start_processes, wait
from sharded import ALIGNED, differing, load_dcp, make, mesh_of, outcome, run, save_dcp

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_fsdp2.py"
GLOO_TIMEOUT = 60.0  # seconds

pytestmark = pytest.mark.timeout(1800)


def dying_run(rank: int, world: int, folder: str) -> None:
    """A look is due in the step that the last process does not live to see."""
    model, compiled = make(ALIGNED, "adamw", mesh_of(world), interval=4)
    run(model, compiled, range(6))
    save_dcp(model, compiled, f"{folder}/6")
    run(model, compiled, range(6, 7))
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    run(model, compiled, range(7, 9))


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_checkpoint_loads(tmp_path: Path) -> None:
    processes = start_processes(
        2, dying_run, str(tmp_path), folder=tmp_path, timeout=GLOO_TIMEOUT
    )  # fmt: skip
    processes[1].join(300)
    assert processes[1].exitcode == -signal.SIGKILL
    wait(processes, GLOO_TIMEOUT + 30)
    succeeded, error = torch.load(tmp_path / "0", weights_only=True)
    assert not succeeded
    assert "all_reduce" in error
    assert "gloo" in error or "Connection" in error
    model, compiled = make(ALIGNED, "adamw", interval=4)
    load_dcp(model, compiled, str(tmp_path / "6"))
    run(model, compiled, range(6, 9))
    whole_model, uninterrupted = make(ALIGNED, "adamw", interval=4)
    run(whole_model, uninterrupted, range(9))
    expected = outcome(whole_model, uninterrupted)
    assert not differing(outcome(model, compiled)["states"], expected["states"])


def torchrun(processes: int, folder: Path) -> subprocess.Popen[str]:
    """The example, small."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", str(EXAMPLE), "--out", str(folder)),
        *("--steps", "24", "--save-every", "5", "--interval", "6", "--batch", "4"),
        *("--layers", "1", "--width", "64", "--context", "32"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment,
    )  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    """By step; of a step that was made twice, the later one."""
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def kill_all(process: subprocess.Popen[str]) -> None:
    """torchrun and its workers, which are in sessions of their own."""
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        for pid in (*map(int, children.split()), process.pid):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_the_example_is_killed_and_goes_on_with_another_world(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = torchrun(2, killed)
    latest, deadline = killed / "latest", time.monotonic() + 600
    try:
        while not (latest.exists() and latest.read_text() == "step-10"):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        kill_all(process)
    output = finish(torchrun(1, killed))
    assert "1 processes, from step 1" in output
    assert "true bits per element" in output
    finish(torchrun(2, whole))
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-3)
    assert len(losses(whole)) == 24
