"""Checkpoints of states that are not of their parameter's shape, or in lists."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

import stq_compile as stq
from models import backward, equal, make_model
from stq_compile import PackedState, errors
from stq_compile.dcp import LoadPlanner
from stq_compile.state_tree import leaves
from test_regions import Whitened, adafactor, train

OPTIONS = {"precision": 8, "min_numel": 16}
MAKERS = [Whitened, pytest.param(adafactor, marks=pytest.mark.slow)]


def through_a_file(checkpoint: Any) -> Any:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fresh(make: Any, like: Any, packed: bool = True) -> Any:
    model = make_model(1)
    model.load_state_dict(like.state_dict())
    optimizer = make(list(model.parameters()))
    return model, stq.compile(optimizer, **OPTIONS) if packed else optimizer


def go_on(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("started", [pytest.param(False, marks=pytest.mark.slow), True])
def test_resume_is_exact_to_the_bit(make: Any, started: bool) -> None:
    model, optimizer = train(make, 4, **OPTIONS)
    saved = through_a_file(optimizer.state_dict())
    other, again = fresh(make, model)
    if started:
        go_on(other, again, range(50, 52))
        other.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    kinds = [type(leaf.value) for leaf in leaves(again)]
    assert kinds == [type(leaf.value) for leaf in leaves(optimizer)]
    assert PackedState in kinds
    for one in ((model, optimizer), (other, again)):
        go_on(*one, range(4, 7))
    assert equal(model.parameters(), other.parameters())


def test_through_torch_distributed_checkpoint(tmp_path: Path) -> None:
    """A plain state dict, whose keys are numbers."""
    model, optimizer = train(Whitened, 4, **OPTIONS)
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)
    other, again = fresh(Whitened, model)
    go_on(other, again, range(50, 52))
    other.load_state_dict(model.state_dict())
    state = {"optimizer": again.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, planner=LoadPlanner())
    again.load_state_dict(state["optimizer"])
    for one in ((model, optimizer), (other, again)):
        go_on(*one, range(4, 7))
    assert equal(model.parameters(), other.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_fp32_form_is_what_the_stock_optimizer_saves(make: Any) -> None:
    model, optimizer = train(make, 4, **OPTIONS)
    saved = stq.state_dict(optimizer, format="fp32")
    other, stock = fresh(make, model, packed=False)
    stock.load_state_dict(copy.deepcopy(saved))
    pairs = list(zip(leaves(stock), leaves(optimizer), strict=True))
    assert all(type(mine.value) is Tensor for mine, _ in pairs)
    assert all(torch.equal(mine.value, ours.value + 0) for mine, ours in pairs)
    go_on(other, stock, range(4, 5))
    third, packed = fresh(make, model)
    packed.load_state_dict(saved)
    go_on(third, packed, range(4, 5))
    assert any(isinstance(leaf.value, PackedState) for leaf in leaves(packed))
    for p, q in zip(other.parameters(), third.parameters(), strict=True):
        assert (p - q).norm() <= 0.01 * p.norm()


def first_packed(saved: Any) -> Any:
    return saved["state"][0]["sides"][0]


BROKEN: dict[str, Callable[[Any], Any]] = {
    "parameters of other shapes": lambda saved: saved["stq"]["sizes"][0].reverse(),
    "a parameter too few": lambda saved: saved["stq"]["sizes"].pop(),
    "sizes of another kind": lambda saved: saved["stq"].update(sizes=7),
    "strides": lambda saved: first_packed(saved).update(stride=[1, 1]),
    "negative size": lambda saved: first_packed(saved).update(size=[-24, -24]),
    "huge": lambda saved: first_packed(saved).update(size=[2**40, 2**40], stride=[2**40, 1]),
    "size no list": lambda saved: first_packed(saved).update(size="24"),
    "codes": lambda saved: first_packed(saved).update(codes=torch.zeros(3, dtype=torch.uint8)),
    "complex": lambda saved: saved["state"][1]["sides"].append(torch.zeros(2, dtype=torch.cfloat)),
}  # fmt: skip


@pytest.mark.parametrize("started", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_broken_one_is_refused_whole(started: bool) -> None:
    model, optimizer = train(Whitened, 3, **OPTIONS)
    other, again = fresh(Whitened, model)
    if started:
        go_on(other, again, range(50, 52))
    before = [(leaf.key, leaf.value, leaf.value + 0) for leaf in leaves(again)]
    for name, change in BROKEN.items():
        broken = copy.deepcopy(optimizer.state_dict())
        change(broken)
        with pytest.raises(errors.CheckpointError, match="Nothing was loaded") as caught:
            again.load_state_dict(broken)
        assert "stq.sizes" in str(caught.value) or "state[" in str(caught.value), name
        after = [(leaf.key, leaf.value) for leaf in leaves(again)]
        for (key, state, values), (key_now, state_now) in zip(before, after, strict=True):
            assert key == key_now
            assert state is state_now
            assert torch.equal(state + 0, values)


def test_a_stock_state_of_strange_shape_needs_one_to_compare_with() -> None:
    """Into an optimizer without states only what is made of the parameter's sizes."""
    model, _ = train(Whitened, 1)
    _, again = fresh(Whitened, model)
    _, stock = train(Whitened, 3)
    saved = stock.state_dict()
    saved["state"][0]["sides"][0] = torch.zeros(5, 5)
    with pytest.raises(errors.CheckpointError, match=r"state\[0\]\.sides\.0 is .*\[5, 5\]"):
        again.load_state_dict(saved)
