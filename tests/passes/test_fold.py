"""Equal components share a template; float literals in which they differ become inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphs import Sketch, assert_pure, assert_same, program, random_inputs, run
from stq_compile.passes.fold import fold, structural_hash
from stq_compile.pytest_plugin import Golden
from stq_compile.step_graph import Program, Role, StepGraph

GPT2_SHAPES: list[tuple[int, ...]] = [
    (50257, 768),
    (1024, 768),
    *[
        shape
        for _ in range(12)
        for shape in (
            (768,), (768,), (768, 2304), (2304,), (768, 768), (768,),
            (768,), (768,), (768, 3072), (3072,), (3072, 768), (768,),
        )
    ],
    (768,),
    (768,),
]  # fmt: skip


def component(
    i: int = 0,
    shape: tuple[int, ...] = (3, 5),
    *,
    decay: float = 0.01,
    lr: float = 0.1,
    key: str = "buf",
    count: int = 1,
    edit: Callable[[Sketch, fx.Node], Any] = lambda s, p: None,
) -> StepGraph:
    """SGD with momentum and decoupled decay of one parameter."""
    s = Sketch(f"step_{i}", shape)
    p, g, m = s.param(i), s.grad(i), s.state(key, i)
    if decay:
        s.call("mul_", p, 1 - lr * decay, at="sgd.py:3 p.mul_(1 - lr * weight_decay)")
    s.call("mul_", m, 0.9)
    s.call("add_", m, g)
    s.call("add_", p, m, alpha=-lr, at="sgd.py:5 p.add_(m, alpha=-lr)")
    s.call("add_", m, count)
    edit(s, p)
    return s.inplace()


def gpt2(decayed: float, plain: float) -> Program:
    """148 components; matrices decay by ``decayed``, vectors by ``plain``."""
    units = [
        component(i, shape, decay=decayed if len(shape) > 1 else plain)
        for i, shape in enumerate(GPT2_SHAPES)
    ]
    return program(*units)


def test_pass(stq_golden: Golden) -> None:
    before = program(component(0), component(1, (7,)), component(2, decay=0.5, lr=0.2))
    stq_golden(str(assert_pure(fold, before)))


def test_a_template_runs_as_each_of_its_components() -> None:
    components = [component(0), component(1), component(2, decay=0.5, lr=0.2)]
    (template,) = fold(program(*components)).units
    for unit, instance in zip(components, template.instances, strict=True):
        inputs = random_inputs(unit, seed=3)
        hoisted = {
            o.name: torch.tensor(o.value, dtype=o.dtype)
            for o in instance.operands
            if o.value is not None
        }
        own = [o for o in instance.operands if o.value is None]
        renamed = hoisted | dict(zip([o.name for o in own], inputs.values(), strict=True))
        after = run(template, renamed)
        expected = run(unit, inputs)
        assert_same(
            dict(zip([o.name for o in own], expected.values(), strict=True)),
            {name: value for name, value in after.items() if name not in hoisted},
        )


def test_gpt2_is_one_template_where_groups_differ_in_a_value() -> None:
    (template,) = fold(gpt2(0.1, 0.05)).units
    assert len(template.instances) == 148
    constants = [o for o in template.operands if o.role is Role.SCALAR]
    assert len(constants) == 1
    values = {i.operands[0].value for i in template.instances}
    assert values == {1 - 0.1 * 0.1, 1 - 0.1 * 0.05}
    sources = [i.param.source.param for i in template.instances]
    assert sources == list(range(148))
    assert [i.param.shape for i in template.instances] == GPT2_SHAPES


def test_gpt2_is_two_templates_where_one_group_has_no_decay() -> None:
    matrices, vectors = fold(gpt2(0.1, 0.0)).units
    assert (matrices.name, vectors.name) == ("template_0", "template_1")
    assert len(matrices.instances) == 50
    assert len(vectors.instances) == 98
    assert not any(o.role is Role.SCALAR for o in matrices.operands)


def test_equal_literals_stay_literals() -> None:
    (template,) = fold(program(component(0), component(1))).units
    assert [o.name for o in template.operands] == ["param_0", "grad_0", "buf_0"]


def test_the_hash_ignores_shapes_names_and_float_literals() -> None:
    base = structural_hash(component(0))
    assert structural_hash(component(5)) == base
    assert structural_hash(component(0, (7, 2, 2))) == base
    assert structural_hash(component(0, lr=0.3)) == base


DIFFERENT: dict[str, StepGraph] = {
    "structure": component(0, decay=0.0),
    "a further node": component(0, edit=lambda s, p: s.call("neg_", p)),
    "a state key": component(0, key="other"),
    "an integer literal": component(0, count=2),
    "a float for an integer": component(0, count=1.0),  # type: ignore[arg-type]
    "a keyword": component(0, edit=lambda s, p: s.call("add_", p, 1, alpha=2)),
    "another keyword": component(0, edit=lambda s, p: s.call("add_", p, 1, value=2)),
    "a 0-dim parameter": component(0, ()),
}


def test_the_hash_sees_differences_of() -> None:
    hashes = {structural_hash(unit) for unit in DIFFERENT.values()}
    assert len(hashes | {structural_hash(component(0))}) == len(DIFFERENT) + 1


def test_the_hash_sees_operators_arguments_roles_and_dtypes() -> None:
    def unit(target: str, swap: bool, role: str, dtype: torch.dtype) -> StepGraph:
        s = Sketch()
        a, b = s.param(), s.grad()
        if role == "scalar":
            b = s.scalar("x", 1.0)
        s.call(target, b if swap else a, a if swap else b)
        whole = s.inplace()
        operands = [o.__class__(**{**o.__dict__, "dtype": dtype}) for o in whole.operands]
        (instance,) = whole.instances
        return whole.replace(instances=(instance.__class__(tuple(operands)),))

    variants = [
        unit("add", False, "grad", torch.float32),
        unit("sub", False, "grad", torch.float32),
        unit("add", True, "grad", torch.float32),
        unit("add", False, "scalar", torch.float32),
        unit("add", False, "grad", torch.bfloat16),
    ]
    assert len({structural_hash(v) for v in variants}) == len(variants)


def test_a_nested_literal_is_hoisted_where_it_stands() -> None:
    def unit(i: int, value: float) -> StepGraph:
        s = Sketch(f"step_{i}", (2,))
        p = s.param(i)
        s.call("copy_", p, s.call(torch.stack, [s.call("sum", p), s.call(torch.full, (), value)]))
        return s.inplace()

    (template,) = fold(program(unit(0, 1.5), unit(1, 2.5))).units
    inputs = random_inputs(template)
    inputs["constant_0"].fill_(2.5)
    before = inputs["param_0"]
    assert_same(
        run(template, inputs) | {"constant_0": inputs["constant_0"]},
        inputs | {"param_0": torch.stack([before.sum(), torch.tensor(2.5)])},
    )
