"""Memory before training is what training then takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stq_compile as stq
from stq_compile.architectures import MODELS
from stq_compile.inspection import inspect_optimizer
from stq_compile.memory import plan_memory, shard_numel
from stq_compile.options import Options
from stq_compile.targets import make_optimizer

# Parameters as published: GPT-2's released weights, Llama 3's, torchvision's models (ViT-H/14 at
# 224 x 224, without the positions of torchvision's larger images).
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "vit-b": 86_567_656,
    "vit-l": 304_326_632,
    "vit-h": 632_045_800,
}


def test_models_have_their_published_sizes() -> None:
    sizes = {name: sum(map(math.prod, make().values())) for name, make in MODELS.items()}
    assert sizes == PUBLISHED
    assert len(MODELS["gpt2"]()) == 148


@pytest.mark.parametrize("options", [{"target_bits": 5.0}, {"precision": 3}], ids=str)
def test_states_take_what_was_planned(options: dict[str, float]) -> None:
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 130), nn.LayerNorm(130))
    plan = plan_memory(
        inspect_optimizer(torch.optim.AdamW(model.parameters()), Options.from_dict(options))
    )
    optimizer = stq.compile(torch.optim.AdamW(model.parameters()), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    report = stq.report(optimizer)
    assert plan.holdings["packed"].states == report.state_bytes
    assert plan.holdings["fp32"].states == report.fp32_bytes
    assert plan.bits_per_element == pytest.approx(report.bits_per_element)
    params = sum(p.numel() for p in model.parameters())
    assert plan.holdings["packed"].total == 8 * params + report.state_bytes
    assert sum(t.bytes for t in plan.tensors) == report.state_bytes
    assert [t.bytes for t in plan.tensors] == sorted((t.bytes for t in plan.tensors), reverse=True)


@pytest.mark.parametrize("world_size", [1, 3, 4, 8, 64])
def test_shards_are_torchs_largest_chunk(world_size: int) -> None:
    for shape in [(), (7,), (50257, 3), (2, 5, 5), (64, 2)]:
        tensor = torch.empty(shape)
        largest = max(c.numel() for c in tensor.chunk(world_size)) if shape else 1
        assert shard_numel(shape, world_size) == largest


def test_eight_bits_are_eight_bits_whatever_else_was_asked_for() -> None:
    plan = plan_memory(inspect_optimizer(make_optimizer("AdamW"), Options(target_bits=4.0)))
    states = plan.holdings["8-bit"].states
    assert states == pytest.approx(2 * 128 * 64, rel=0.03)
    assert plan.holdings["packed"].states < 0.6 * states
    assert not plan.holdings["fp32"].fits(0)
