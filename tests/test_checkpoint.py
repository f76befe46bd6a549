"""Checkpoints: packed, exact, and refused whole if anything is wrong with them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stq_compile as stq
from models import backward, equal, make_model
from sharded import OPTIMIZERS, change_by_hand
from stq_compile import PackedState, errors
from stq_compile.backend import session_of

Make = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(precision: Any = None, **options: Any) -> Make:
    precision = precision or {"exp_avg": 4, "exp_avg_sq": 3}
    return lambda model: stq.compile(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        precision=precision, min_numel=64, **options,
    )  # fmt: skip


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return stq.compile(optimizer, precision=4, min_numel=64)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def through_a_file(checkpoint: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(make: Make, checkpoint: Any, weights: Any, started: bool) -> Any:
    """A new process, as it were: another model, another optimizer, and the checkpoint."""
    model = make_model(1)
    optimizer = make(model)
    if started:
        train(model, optimizer, range(50, 52))
    model.load_state_dict(weights)
    optimizer.load_state_dict(checkpoint)
    return model, optimizer


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    "make", [adamw(), adamw({"*": 3}), adamw({"*": 16}), adamw(rounding="nearest"), sgd]
)
def test_resume_is_exact_to_the_bit(make: Make, started: bool) -> None:
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(3))
    saved = through_a_file(
        {"optimizer": optimizer.state_dict(), "model": copy.deepcopy(model.state_dict())}
    )
    train(model, optimizer, range(3, 8))
    other, again = resumed(make, saved["optimizer"], saved["model"], started)
    train(other, again, range(3, 8))
    assert equal(model.parameters(), other.parameters())


@pytest.mark.parametrize("precision", [4, 32])
def test_resume_is_exact_where_hyperparameters_change(precision: int) -> None:
    """They are inputs of the one graph and numbers in the other, which is captured later."""

    def schedule(optimizer: torch.optim.Optimizer, step: int) -> None:
        share = 1 / (1 + step)
        betas = (0.9 - 0.01 * step, 0.999 - 0.001 * step)
        optimizer.param_groups[0].update(lr=0.01 * share, betas=betas, weight_decay=0.1 * share)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            schedule(optimizer, step)
            train(model, optimizer, range(step, step + 1))

    make = adamw(precision)
    model = make_model()
    optimizer = make(model)
    run(model, optimizer, range(4))
    saved = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    run(model, optimizer, range(4, 9))
    other, again = resumed(make, *saved, False)
    run(other, again, range(4, 9))
    assert equal(model.parameters(), other.parameters())


def edit(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        place: Any = saved
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to(place[path[-1]]) if callable(to) else to

    return change


def planned(kind: str = "adamw", **options: Any) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[kind](model.parameters())
        return stq.compile(optimizer, **{"min_numel": 64, "interval": 3, **options})

    return make


def widths(optimizer: torch.optim.Optimizer) -> list[int]:
    return [row.width for row in stq.report(optimizer).rows]


def train_and_change(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The planner leaves Muon's states alone: their widths are changed by hand."""
    for step in steps:
        train(model, optimizer, range(step, step + 1))
        if isinstance(optimizer, torch.optim.Muon):
            change_by_hand(optimizer, step)


@pytest.mark.parametrize("kind", ["adamw", "muon", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_planned_run_resumes_at_any_step(kind: str) -> None:
    """Before the first look (2), at looks that calibrate and change widths (3, 6, 12), between."""
    model = make_model()
    make = planned(kind, **({"tolerance": 0.02} if kind == "sgd" else {}))  # else its plan stays
    optimizer = make(model)
    saved = {}
    for step in range(14):
        if step in (2, 3, 6, 7, 12):
            saved[step] = copy.deepcopy(
                through_a_file({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
            )
        train_and_change(model, optimizer, range(step, step + 1))
    assert stq.report(optimizer).transitions > 0
    for step, checkpoint in saved.items():
        other, again = resumed(make, checkpoint["optimizer"], checkpoint["model"], False)
        train_and_change(other, again, range(step, 14))
        assert equal(model.parameters(), other.parameters()), step
        assert stq.report(again).rows == stq.report(optimizer).rows
        assert stq.history(again).records == stq.history(optimizer).records


def test_a_planned_run_resumes_where_decays_change() -> None:
    """A decay is a number in the graph that a resumed run captures; in the other it is an input."""

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            betas = (0.9 - 0.02 * step, 0.999 - 0.002 * step)
            optimizer.param_groups[0].update(betas=betas)
            train(model, optimizer, range(step, step + 1))

    model = make_model()
    optimizer = planned()(model)
    go_on(model, optimizer, range(7))
    saved = through_a_file({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    saved = copy.deepcopy(saved)
    go_on(model, optimizer, range(7, 17))
    other, again = resumed(planned(), saved["optimizer"], saved["model"], False)
    go_on(other, again, range(7, 17))
    assert len(stq.history(again)) > 4
    assert stq.history(again).records == stq.history(optimizer).records
    assert equal(model.parameters(), other.parameters())


def test_other_planning_options_convert_or_decide_at_once() -> None:
    model = make_model()
    optimizer = planned()(model)
    train(model, optimizer, range(3))
    saved, weights = optimizer.state_dict(), model.state_dict()
    other, again = resumed(planned(target_bits=4.5), saved, weights, False)
    train(other, again, range(3, 4))
    assert stq.report(again).bits_per_element <= 4.5
    assert len(stq.history(again)) == len(stq.history(optimizer)) + 1
    other, again = resumed(planned(precision=4), saved, weights, False)
    train(other, again, range(3, 4))
    assert {r.width for r in stq.report(again).rows if len(r.shape) > 1} == {4}


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_codes_of_earlier_versions_meant_other_numbers(version: int) -> None:
    model = make_model()
    optimizer = planned(precision=4)(model)
    train(model, optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    saved["stq"]["version"] = version
    before = through_a_file(optimizer.state_dict())
    with pytest.raises(errors.CheckpointError, match="fp32"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


P = ("stq", "planner")
BROKEN_PLANNERS = {
    "looks": edit(*P, "looks", to=-1),
    "widths": edit(*P, "widths", 0, 2, to=7),
    "waited": edit(*P, "waited", 0, to=[1]),
    "measured": edit(*P, "measured", 0, 2, "4", to=float("nan")),
    "measured factors": edit(*P, "measured", 0, 3, "range", to="wide"),
    "measured level": edit(*P, "measured", 0, 4, to=None),
    "measured lost": edit(*P, "measured", 0, 5, to=-1.0),
    "observations": edit(*P, "observations", to=3),
    "calibration": edit(*P, "calibration", to=None),
    "calibration.names": edit(*P, "calibration", "names", to=["weather"]),
    "calibration.limit": edit(*P, "calibration", "limit", to=True),
    "history": edit(*P, "history", 0, "step", to=1.5),
    "history changes": edit(*P, "history", 0, "changes", 0, "after", to=9),
    "history no list": edit(*P, "history", to={}),
    "missing": edit(*P, to=lambda planner: {k: planner[k] for k in list(planner)[:-1]}),
    "no dict": edit(*P, to=[]),
    "plan": edit("stq", "plan", 0, 2, to=16),
}


def test_a_broken_planner_is_refused_whole() -> None:
    model = make_model()
    optimizer = planned()(model)
    train(model, optimizer, range(4))
    saved = optimizer.state_dict()
    session = session_of(optimizer)
    assert session is not None
    assert session.planner is not None
    for name, change in BROKEN_PLANNERS.items():
        broken = copy.deepcopy(saved)
        for path in ("widths", "waited", "measured", "observations"):
            broken["stq"]["planner"][path] = [list(r) for r in broken["stq"]["planner"][path]]
        for record in broken["stq"]["planner"]["history"]:
            record["changes"] = list(record["changes"])
        change(broken)
        with pytest.raises(errors.CheckpointError, match=r"stq\.planner") as caught:
            optimizer.load_state_dict(broken)
        assert "Nothing was loaded" in str(caught.value), name
        assert session.planner.state_dict() == saved["stq"]["planner"]
        assert session.plan == {(p, k): w for p, k, w in saved["stq"]["plan"]}
    train(model, optimizer, range(4, 5))


def test_resume_with_changed_widths() -> None:
    model = make_model()
    optimizer = adamw()(model)
    train(model, optimizer, range(2))
    session = session_of(optimizer)
    assert session is not None
    session.change_widths({(0, "exp_avg"): 6, (2, "exp_avg_sq"): 8})
    train(model, optimizer, range(2, 4))
    saved = through_a_file(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(4, 7))
    other, again = resumed(adamw(), saved, weights, False)
    train(other, again, range(4, 7))
    assert equal(model.parameters(), other.parameters())
    assert stq.report(again).rows == stq.report(optimizer).rows


def test_fp32_form_loads_into_the_stock_optimizer_and_back() -> None:
    model = make_model()
    optimizer = adamw()(model)
    train(model, optimizer, range(3))
    saved = stq.state_dict(optimizer, format="fp32")
    assert "stq" not in saved
    stock = torch.optim.AdamW(make_model(1).parameters())
    stock.load_state_dict(copy.deepcopy(saved))
    for p, q in zip(model.parameters(), stock.param_groups[0]["params"], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert type(stock.state[q][key]) is torch.Tensor
            assert torch.equal(stock.state[q][key], optimizer.state[p][key] + 0)
    other, again = resumed(adamw(), saved, model.state_dict(), True)
    train(other, again, range(3, 4))
    assert isinstance(next(iter(again.state.values()))["exp_avg"], PackedState)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("started", [False, True])
def test_a_stock_checkpoint_is_packed_state_by_state(dtype: torch.dtype, started: bool) -> None:
    """Until a step packs them one by one, float32 states are the checkpoint's own memory, and
    bfloat16 ones stay at 16 bits."""
    model = make_model()
    stock = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, stock, range(3))
    saved = copy.deepcopy(stock.state_dict())
    for entries in saved["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            entries[key] = entries[key].to(dtype)
    other, again = resumed(adamw(), saved, model.state_dict(), started)
    for i, entries in enumerate(again.state.values()):
        for key in ("exp_avg", "exp_avg_sq"):
            given = saved["state"][i][key]
            if dtype == torch.float32:
                assert entries[key].data_ptr() == given.data_ptr()
            else:
                assert entries[key].format.name == "bfloat16"
                assert torch.equal(entries[key] + 0, given.float())
    loaded = [{k: v + 0 for k, v in entries.items()} for entries in saved["state"].values()]
    train(other, again, range(3, 4))
    train(model, stock, range(3, 4))
    assert again.state_dict()["state"][0]["exp_avg"]["format"].endswith("4")
    for (p, entries), before in zip(again.state.items(), loaded, strict=True):
        assert torch.equal(entries["step"], before["step"] + 1)
        assert p.isfinite().all()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p - q).norm() <= 0.01 * p.norm()


def test_other_widths_are_converted() -> None:
    model = make_model()
    optimizer = adamw()(model)
    train(model, optimizer, range(3))
    other, again = resumed(adamw({"*": 8}), optimizer.state_dict(), model.state_dict(), False)
    train(other, again, range(3, 4))
    widths = {r.width for r in stq.report(again).rows if len(r.shape) > 1}
    assert widths == {8}


def test_a_checkpoint_is_small_and_independent() -> None:
    p = nn.Parameter(torch.randn(1_000_000))
    p.grad = torch.randn(1_000_000)
    optimizer = stq.compile(torch.optim.AdamW([p]), precision=4)
    optimizer.step()
    sizes = []
    for saved in (optimizer.state_dict(), stq.state_dict(optimizer, format="fp32")):
        file = io.BytesIO()
        torch.save(saved, file)
        sizes.append(file.tell())
    assert sizes[0] <= 0.13 * sizes[1]
    other = stq.compile(torch.optim.AdamW([p]), precision=4)
    saved = optimizer.state_dict()
    codes = saved["state"][0]["exp_avg"]["codes"].clone()
    other.load_state_dict(saved)
    other.step()  # writes its own codes, not the checkpoint's
    assert torch.equal(saved["state"][0]["exp_avg"]["codes"], codes)


M = ("state", 0, "exp_avg")
BROKEN = {
    "version": edit("stq", "version", to=99),
    "steps": edit("stq", "steps", to="many"),
    "seed": edit("stq", "seed", to=-1),
    "header": edit("stq", to=[1, 2]),
    "plan": edit("stq", "plan", to=[[1, 2]]),
    "format": edit(*M, "format", to="softsign7"),
    "unhashable format": edit(*M, "format", to=[]),
    "size": edit(*M, "size", to=[3, 3]),
    "stride": edit(*M, "stride", to=None),
    "codes cut": edit(*M, "codes", to=lambda codes: codes[:-1]),
    "codes of another dtype": edit(*M, "codes", to=lambda codes: codes.float()),
    "codes no tensor": edit(*M, "codes", to=b"123"),
    "code out of range": edit(*M, to=lambda entry: {
        **entry, "format": "softsign4", "normalizer": None,
        "codes": torch.full_like(entry["codes"], 255),
    }),
    "scale nan": edit(*M, "scales", to=lambda scales: torch.full_like(scales, 0x7FC0)),
    "scale negative": edit(*M, "scales", to=lambda scales: torch.full_like(scales, -5)),
    "variance scale inf": edit("state", 0, "exp_avg_sq", "scales", to=lambda s: s * 0 - 0x100),
    "variance scale tiny": edit("state", 0, "exp_avg_sq", "scales", to=lambda s: s * 0 + 0x120),
    "normalizer of a plain format": edit("state", 0, "exp_avg_sq", "normalizer", to="exp_avg"),
    "no normalizer": edit(*M, "normalizer", to=None),
    "unknown normalizer": edit(*M, "normalizer", to="step"),
    "eager writes": edit(*M, "eager_writes", to=1.5),
    "state no dict": edit("state", to=3),
    "entries no dict": edit("state", 0, to="x"),
    "groups": edit("param_groups", to=None),
    "no step": edit("state", 0, to=lambda entries: {k: entries[k] for k in entries if k != "step"}),
    "a state of another shape": edit("state", 1, "exp_avg", to=torch.zeros(3)),
    "sharding": edit(*M, "sharding", to=((2,), ((5, 1),))),
    "split": edit(*M, "split", to=True),
    "stranger": edit("state", to=lambda states: {**states, 77: states[0]}),
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_checkpoint_is_refused_whole(change: Callable[[dict[str, Any]], None]) -> None:
    model = make_model()
    optimizer = adamw()(model)
    train(model, optimizer, range(2))
    broken = copy.deepcopy(optimizer.state_dict())
    change(broken)
    other = make_model(1)
    again = adamw(seed=5)(other)
    train(other, again, range(2))
    session = session_of(again)
    assert session is not None
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(errors.CheckpointError, match="Nothing was loaded"):
        again.load_state_dict(broken)
    after = again.state_dict()
    assert after["stq"] == before["stq"]
    for i, entries in before["state"].items():
        for key, value in entries.items():
            now = after["state"][i][key]
            same = value["codes"].equal(now["codes"]) if isinstance(value, dict) else value == now
            assert same.all() if isinstance(same, torch.Tensor) else same
    train(other, again, range(2, 3))


def test_unknown_form() -> None:
    with pytest.raises(errors.InvalidOptionError, match="packed"):
        stq.state_dict(adamw()(make_model()), format="int8")  # type: ignore[arg-type]
    with pytest.raises(errors.NotCompiledError):
        stq.state_dict(torch.optim.AdamW(make_model().parameters()))
