"""Checkpoints of sharded optimizers: resumed bit by bit, on as many processes or on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import stq_compile as stq
from processes import run_processes
from sharded import (
    ALIGNED,
    CUT,
    differing,
    distance,
    load_dcp,
    make,
    mesh_of,
    outcome,
    run,
    save_dcp,
    step,
    widths,
)

END = 11
OPTIONS = {"interval": 3}  # looks and changes of widths at steps 3, 6, 9

pytestmark = pytest.mark.timeout(1800)

# Before the first look, right after one, between two, right after a change, after the last.
POINTS = (2, 3, 5, 6, 10)


def saving_run(
    rank: int, world: int, folder: str, points: tuple[int, ...], optimizer: str, cut: bool
) -> Any:
    """A run that saves as it goes: every other checkpoint while it goes on."""
    model, compiled = make(shapes(cut), optimizer, mesh_of(world), **OPTIONS)
    pending, group = [], dist.new_group(backend="gloo")
    for i, point in enumerate(points):
        run(model, compiled, range(points[i - 1] if i else 0, point))
        pending.append(
            save_dcp(model, compiled, f"{folder}/{point}", later=group if i % 2 else None)
        )
        torch.save(compiled.state_dict(), f"{folder}/{point}-{rank}.pt")
    run(model, compiled, range(points[-1], END))
    for future in pending[1::2]:
        future.result()
    return outcome(model, compiled)


def resumed_run(rank: int, world: int, folder: str, point: int, optimizer: str, cut: bool) -> Any:
    model, compiled = make(shapes(cut), optimizer, mesh_of(world), **OPTIONS)
    load_dcp(model, compiled, f"{folder}/{point}")
    run(model, compiled, range(point, END))
    return outcome(model, compiled)


def resumed_runs(
    rank: int, world: int, folder: str, points: tuple[int, ...], optimizer: str
) -> list[Any]:
    return [resumed_run(rank, world, folder, point, optimizer, False) for point in points]


def own_file_run(rank: int, world: int, folder: str, point: int, optimizer: str) -> Any:
    """Every process loads the file that it saved, with nothing registered."""
    model, restored = make(ALIGNED, optimizer, mesh_of(world), **OPTIONS)
    saved = torch.load(f"{folder}/{point}-{rank}.pt", weights_only=True)
    dcp.load(state := {"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/{point}")
    set_model_state_dict(model, state["model"])
    restored.load_state_dict(saved)
    run(model, restored, range(point, END))
    return outcome(model, restored)


def own_file_runs(
    rank: int, world: int, folder: str, points: tuple[int, ...], optimizer: str
) -> list[Any]:
    return [own_file_run(rank, world, folder, point, optimizer) for point in points]


def resumed_here(folder: str, point: int, optimizer: str, cut: bool) -> Any:
    """In this process, with ordinary tensors."""
    model, compiled = make(shapes(cut), optimizer, **OPTIONS)
    load_dcp(model, compiled, f"{folder}/{point}")
    run(model, compiled, range(point, END))
    return outcome(model, compiled)


def shapes(cut: bool) -> dict[str, tuple[int, ...]]:
    return {**ALIGNED, **CUT} if cut else ALIGNED


def check_same(result: Any, expected: Any) -> None:
    assert not differing(result["params"], expected["params"])
    assert not differing(result["states"], expected["states"])
    assert widths(result) == widths(expected)
    assert result["history"] == expected["history"]
    assert result["report"].transitions == expected["report"].transitions
    assert result["report"].reencoded == ()


def continuing_run(rank: int, world: int, folder: str) -> Any:
    """Takes over at step 5 and leaves a checkpoint of step 7."""
    model, compiled = make(ALIGNED, "adamw", mesh_of(world), **OPTIONS)
    load_dcp(model, compiled, f"{folder}/5")
    run(model, compiled, range(5, 7))
    save_dcp(model, compiled, f"{folder}/7")
    run(model, compiled, range(7, END))
    return outcome(model, compiled)


def test_from_one_process_to_two_and_back(tmp_path: Path) -> None:
    folder = str(tmp_path)
    model, compiled = make(ALIGNED, "adamw", **OPTIONS)
    run(model, compiled, range(5))
    save_dcp(model, compiled, f"{folder}/5")
    run(model, compiled, range(5, END))
    expected = outcome(model, compiled)
    assert expected["report"].transitions > 0
    for result in run_processes(2, continuing_run, folder):
        check_same(result, expected)
    check_same(resumed_here(folder, 7, "adamw", False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_resume_at_five_points(optimizer: str, tmp_path: Path) -> None:
    """Through torch.distributed.checkpoint on 2 processes and on one, and through own files."""
    folder = str(tmp_path)
    expected = run_processes(2, saving_run, folder, POINTS, optimizer, False)
    assert expected[0]["report"].transitions > 0
    for runs in (resumed_runs, own_file_runs):
        for results in run_processes(2, runs, folder, POINTS, optimizer):
            for result in results:
                check_same(result, expected[0])
    for point in POINTS:
        check_same(resumed_here(folder, point, optimizer, False), expected[0])


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "sgd")] + ["muon"],
)
def test_one_process_resumes_at_five_points(optimizer: str, tmp_path: Path) -> None:
    """Through torch.distributed.checkpoint, with no other process."""
    model, compiled = make(ALIGNED, optimizer, **OPTIONS)
    for before, point in zip((0, *POINTS), (*POINTS, END), strict=True):
        run(model, compiled, range(before, point))
        save_dcp(model, compiled, f"{tmp_path}/{point}")
    expected = outcome(model, compiled)
    assert expected["report"].transitions > 0
    for point in POINTS:
        check_same(resumed_here(str(tmp_path), point, optimizer, False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_from_4_processes_to_2_to_1_and_back(optimizer: str, tmp_path: Path) -> None:
    """All of it is what one process without interruption does."""
    model, compiled = make(ALIGNED, optimizer, **OPTIONS)
    run(model, compiled, range(END))
    expected = outcome(model, compiled)
    for start, worlds in ((4, (2, 1)), (1, (4,))):
        folder = str(tmp_path / str(start))
        run_processes(start, saving_run, folder, (5,), optimizer, False)
        for world in worlds:
            for result in run_processes(world, resumed_run, folder, 5, optimizer, False):
                check_same(result, expected)
        check_same(resumed_here(folder, 5, optimizer, False), expected)


def across_widths(mesh: Any, folder: str, saved: int, asked: int) -> tuple[set[int], list[float]]:
    """Save at some bits, load at others: widths after one step, and how far states moved."""
    model, compiled = make(ALIGNED, "adamw", mesh, precision=saved)
    run(model, compiled, range(4))
    save_dcp(model, compiled, f"{folder}/{saved}-{asked}")
    exact = outcome(model, compiled)["states"]
    other, loaded = make(ALIGNED, "adamw", mesh, precision=asked)
    load_dcp(other, loaded, f"{folder}/{saved}-{asked}")
    found = outcome(other, loaded)["states"]
    step(other, loaded, 4)
    rows = stq.report(loaded).rows
    bits = {row.width for row in rows if len(row.shape) > 1 and "exp_avg" in row.state}
    return bits, [distance(found[k], v) for k, v in exact.items() if k.endswith("exp_avg")]


PAIRS = [(4, 8), (8, 3), (4, 32), (32, 4), (16, 4)]


def across_runs(rank: int, world: int, folder: str) -> list[Any]:
    return [across_widths(mesh_of(world), folder, *pair) for pair in PAIRS]


@pytest.mark.slow
def test_other_widths_than_those_of_the_checkpoint(tmp_path: Path) -> None:
    results = [*run_processes(2, across_runs, str(tmp_path / "sharded"))]
    results.append([across_widths(None, str(tmp_path), *pair) for pair in PAIRS])
    for found in results:
        for (bits, distances), (_, asked) in zip(found, PAIRS, strict=True):
            assert bits == {asked}
            assert max(distances) == 0  # before the first step, what was saved


@pytest.mark.slow
def test_cut_blocks_are_encoded_once_and_named(tmp_path: Path) -> None:
    folder = str(tmp_path)
    expected = run_processes(4, saving_run, folder, (5,), "adamw", True)[0]
    (same, *_) = run_processes(4, resumed_run, folder, 5, "adamw", True)
    check_same(same, expected)
    start, _ = make(shapes(True), "adamw", **OPTIONS)
    results = [*run_processes(2, resumed_run, folder, 5, "adamw", True)]
    results.append(resumed_here(folder, 5, "adamw", True))
    for result in results:
        names = result["report"].reencoded
        assert names
        assert len(names) == 2 * len(CUT)  # both states of each, and of no other
        assert "encoded anew" in str(result["report"])
        for name in CUT:
            moved = distance(start.get_parameter(name), expected["params"][name])
            assert distance(result["params"][name], expected["params"][name]) < 0.3 * moved


def stock_runs(rank: int, world: int, folder: str) -> list[float]:
    """A stock checkpoint of sharded float32 states, loaded through torch.distributed.checkpoint."""
    model, compiled = make(ALIGNED, "adamw", mesh_of(world), **OPTIONS)
    run(model, compiled, range(3))
    exact = {k: v for k, v in outcome(model, compiled)["states"].items() if "exp_avg" in k}
    saved = stq.state_dict(compiled, format="fp32")
    again, packed = make(ALIGNED, "adamw", mesh_of(world), **OPTIONS)
    run(again, packed, range(50, 52))
    packed.load_state_dict(saved)
    found = outcome(again, packed)["states"]
    return [distance(found[k], v) for k, v in exact.items()]


@pytest.mark.slow
def test_a_sharded_stock_checkpoint_is_packed(tmp_path: Path) -> None:
    for distances in run_processes(2, stock_runs, str(tmp_path)):
        assert max(distances) == 0  # not packed before the next step


def damaged_runs(rank: int, world: int, folder: str) -> str:
    """One process's part is damaged: all refuse it."""
    model, compiled = make(ALIGNED, "adamw", mesh_of(world), precision=4)
    run(model, compiled, range(2))
    saved = compiled.state_dict()
    if rank == 1:
        saved["state"][0]["exp_avg"]["scales"].to_local().fill_(-1)
    other, restored = make(ALIGNED, "adamw", mesh_of(world), precision=4)
    run(other, restored, range(7, 9))
    before = outcome(other, restored)["states"]
    message = ""
    try:
        restored.load_state_dict(saved)
    except stq.StqError as error:
        message = str(error)
    assert not differing(outcome(other, restored)["states"], before)
    return message


@pytest.mark.slow
def test_a_part_that_is_damaged_is_refused_by_all(tmp_path: Path) -> None:
    first, second = run_processes(2, damaged_runs, str(tmp_path))
    assert "another process" in first
    assert "scales" in second
