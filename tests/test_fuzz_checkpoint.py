"""Damaged and hostile checkpoints: taken or refused, as a whole, and nothing else happens."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stq_compile as stq
from stq_compile import errors

FEW = settings(
    max_examples=250, deadline=None, suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False, database=None,
)  # fmt: skip
MANY = settings(FEW, max_examples=5000)

TENSORS = (
    torch.zeros(()), torch.full((3, 0), 2.0), torch.full((12, 16), math.nan), torch.ones(12, 16),
    torch.zeros(2, 64, dtype=torch.uint8), torch.full((2,), -1, dtype=torch.int16),
    torch.zeros(12, 16, dtype=torch.bfloat16), torch.zeros(12, 16, dtype=torch.complex64),
    torch.zeros(12, 16).to_sparse(), torch.empty(12, 16, device="meta"), torch.zeros(16, 12).t(),
)  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([2**62, 2**64, -(2**70)]),
    st.floats(), st.text(max_size=5), st.binary(max_size=5), st.just(()), st.just([]),
    st.builds(dict), st.just([[1, "exp_avg", 4]]), st.sampled_from(TENSORS),
    st.sampled_from(["softsign4", "ratio4", "midrise3", "adaptive_log2", "bfloat16", "float32"]),
    st.sampled_from(["constant", "exp_avg", "exp_avg_sq", "step"]),
    st.sampled_from([((2,), ((0, 1),)), ((2, 3), ((0, 1), (1, 1))), ((10**9,), ((0, 1),))]),
    st.sampled_from([((2,), ((7, 1),)), ((0,), ((0, 1),)), ((2, 2), ((0, 10**6), (0, 1)))]),
)  # fmt: skip


def make() -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, 16, generator=generator)) for n in (12, 20)]
    optimizer = stq.compile(torch.optim.AdamW(params, lr=1e-2), min_numel=64, interval=2)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.fixture(scope="module")
def optimizer() -> torch.optim.Optimizer:
    return make()


@pytest.fixture(scope="module")
def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return through_a_file(optimizer.state_dict())


def through_a_file(checkpoint: Any) -> Any:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def keys_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, (list, tuple)) else []


def replaced(value: Any, path: tuple[Any, ...], new: Any, how: str) -> Any:
    """A copy with one place changed: set, removed, or doubled under another name."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        out: Any = dict(value)
    else:
        out = list(value)
    if rest or how == "set":
        out[key] = replaced(out[key], tuple(rest), new, how)
    elif how == "remove":
        del out[key]
    elif isinstance(out, dict):
        out[f"{key}x" if isinstance(key, str) else 77] = out[key]
    else:
        out.append(out[key])
    return tuple(out) if isinstance(value, tuple) else out


@st.composite
def damaged(draw: st.DrawFn, saved: dict[str, Any]) -> Any:
    """A checkpoint with one to three places changed, tensors in part."""
    out: Any = saved
    for _ in range(draw(st.integers(1, 3))):
        path, old = (), out
        while keys_of(old) and not (path and draw(st.integers(0, 4)) == 0):
            key = draw(st.sampled_from(keys_of(old)))
            path, old = (*path, key), old[key]
        if not path:
            return out
        how = draw(st.sampled_from(["set", "set", "set", "remove", "double"]))
        new = draw(VALUES)
        if isinstance(old, Tensor) and old.numel() and draw(st.booleans()):
            new = old.clone().reshape(-1)
            new[draw(st.integers(0, new.numel() - 1))] = draw(st.integers(0, 127))
            new = new.view(old.shape)
        out = replaced(out, path, new, how)
    return out


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that loading could change, and the identity of every state."""
    state = optimizer.state_dict()
    kept = [(id(v), v + 0) for s in optimizer.state.values() for v in s.values()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [kept, copy.deepcopy(state["stq"]), copy.deepcopy(groups)]


def unchanged(before: list[Any], after: list[Any]) -> bool:
    same = all(
        i == j and torch.equal(x, y) for (i, x), (j, y) in zip(before[0], after[0], strict=True)
    )
    return same and before[1:] == after[1:]


def check(optimizer: torch.optim.Optimizer, good: Any, found: Any) -> bool:
    """Load; True if it was taken. Refused, nothing has changed; taken, every state can be read."""
    before = snapshot(optimizer)
    try:
        optimizer.load_state_dict(found)
    except errors.CheckpointError:
        assert unchanged(before, snapshot(optimizer))
        return False
    for param, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, stq.PackedState):
                assert value.shape == param.shape
                assert (value + 0).shape == param.shape
    optimizer.load_state_dict(good)
    return True


def fuzz_structure(profile: settings, optimizer: Any, saved: Any) -> list[bool]:
    taken = []

    @profile
    @given(damaged(saved))
    def one(found: Any) -> None:
        taken.append(check(optimizer, saved, found))

    one()
    return taken


def fuzz_bytes(profile: settings, optimizer: Any, saved: Any) -> list[bool]:
    file = io.BytesIO()
    torch.save(saved, file)
    whole = file.getvalue()
    taken = []

    @profile
    @given(st.data())
    def one(data: st.DataObject) -> None:
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
            if kind == "flip":
                content[at] ^= data.draw(st.integers(1, 255))
            elif kind == "cut":
                del content[at : at + data.draw(st.integers(1, 400))]
            else:
                content[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        try:
            found = torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # torch's own refusal
            taken.append(False)
            return
        taken.append(check(optimizer, saved, found))

    one()
    return taken


def test_damaged_structure(optimizer: Any, saved: Any) -> None:
    taken = fuzz_structure(FEW, optimizer, saved)
    assert taken.count(False) > len(taken) // 4
    assert check(optimizer, saved, saved)


def test_damaged_bytes(optimizer: Any, saved: Any) -> None:
    taken = fuzz_bytes(FEW, optimizer, saved)
    assert taken.count(False) > len(taken) // 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_checkpoints(optimizer: Any, saved: Any) -> None:
    taken = fuzz_structure(MANY, optimizer, saved) + fuzz_bytes(MANY, optimizer, saved)
    assert len(taken) >= 2 * MANY.max_examples


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("place", ["stq", "state", "codes"])
def test_no_code_is_executed(place: str, saved: Any, tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    hostile = copy.deepcopy(saved)
    if place == "codes":
        hostile["state"][0]["exp_avg"]["codes"] = Harmful(victim)
    else:
        hostile[place]["extra"] = Harmful(victim)
    file = io.BytesIO()
    torch.save(hostile, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    assert not victim.exists()
