"""States enter as codes and leave as codes, with the same values as by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphs import Sketch, Values, assert_pure, aten, only, program, random_inputs, run, with_sizes
from stq_compile import reference
from stq_compile.formats import FLOAT32, FORMATS, Format
from stq_compile.options import Rounding
from stq_compile.passes.quantize import DEQUANTIZE, QUANTIZE, insert_quantize
from stq_compile.pytest_plugin import Golden
from stq_compile.rounding import NEAREST, Noise, signed64
from stq_compile.step_graph import Facts, Program, Role, StepGraph, verify
from zoo import ADAM_FACTS, adam, amsgrad, sgd

KEYS = {"exp_avg_0": 0x1234_5678_9ABC_DEF0, "exp_avg_sq_0": 0xFEDC_BA98_7654_3210}
"""The stream key of each state in the step that is run; one has its upper bit set."""
ADAM_FORMATS = [
    ("softsign4", "adaptive_log3"), ("midrise2", "adaptive_log4"), ("midrise3", "bfloat16"),
    ("midrise3", "float32"), ("float32", "adaptive_log8"), ("bfloat16", "softsign6"),
]  # fmt: skip


def quantize(formats: Mapping[str, Format], rounding: Rounding, given: Program) -> Program:
    return insert_quantize(given, lambda o, _: formats.get(o.source.key), rounding)


def adam_formats(first: str, second: str) -> dict[str, Format]:
    return {"exp_avg": FORMATS[first], "exp_avg_sq": FORMATS[second]}


def noise_of(state: str, rounding: Rounding) -> Noise:
    return Noise(KEYS[state]) if rounding == "stochastic" else NEAREST


class ByHand:
    """The quantized step without the pass: decode, run the plain graph, encode."""

    def __init__(self, unit: StepGraph, formats: dict[str, Format], rounding: Rounding) -> None:
        self.unit = unit
        self.rounding: Rounding = rounding
        named = {f"{key}_0": f for key, f in formats.items() if f != FLOAT32}
        # Normalizers first, for what is stored in their units.
        self.formats = dict(sorted(named.items(), key=lambda pair: pair[1].normalized))

    def encode(self, values: Values, before: Values | None = None) -> tuple[Values, Values]:
        """(codes, scales and what stays as it is; the values as stored); at random ``before``
        something was there."""
        packed, stored = {}, dict(values)
        for name, format in self.formats.items():
            unit = stored["exp_avg_sq_0"].flatten() if format.normalized else None
            source = noise_of(name, self.rounding) if before else NEAREST
            words = before[f"{name}_scales"] if before else None
            flat = values[name].flatten()
            codes, scales = reference.encode(flat, format, source, unit, before=words)
            packed |= {f"{name}_codes": codes, f"{name}_scales": scales}
            numel = values[name].numel()
            flat = reference.decode(codes, scales, format, numel, unit)
            stored[name] = flat.view(values[name].shape)
        rest = {name: value for name, value in values.items() if name not in self.formats}
        return packed | rest, stored

    def step(self, inputs: Values) -> tuple[Values, Values]:
        """Packed inputs, and what the step must leave of them."""
        packed, stored = self.encode(inputs)
        after, _ = self.encode(run(self.unit, stored), packed)
        return packed, after


def with_shape(unit: StepGraph, shape: tuple[int, ...]) -> StepGraph:
    for node in unit.placeholders:
        node.meta["example"] = torch.empty(shape, device="meta")
    operands = tuple(replace(o, shape=shape) for o in unit.operands)
    return unit.replace(instances=(replace(unit.instances[0], operands=operands),))


def keys_of(unit: StepGraph) -> Values:
    found = {}
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        if operand.role is Role.KEY:
            found[node.name] = torch.tensor(signed64(KEYS[node.name.removesuffix("_key")]))
    return found


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("first", "second"), ADAM_FORMATS)
@pytest.mark.parametrize("shape", [(3, 5), (300,)])
def test_the_graph_computes_what_is_computed_by_hand(
    shape: tuple[int, ...], first: str, second: str, rounding: Rounding
) -> None:
    plain = with_shape(adam(ADAM_FACTS), shape)
    formats = adam_formats(first, second)
    unit = only(quantize(formats, rounding, program(plain)))
    inputs = random_inputs(plain, seed=5, positive=["exp_avg_sq"])
    packed, expected = ByHand(plain, formats, rounding).step(inputs)
    keys = keys_of(unit)
    assert bool(keys) == (rounding == "stochastic")
    row = {node.name: (packed | keys)[node.name] for node in unit.placeholders}
    after = run(unit, row)
    for name in unit.writes or ():
        assert torch.equal(after[name], expected[name]), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_pass(stq_golden: Golden, rounding: Rounding) -> None:
    formats = {"momentum_buffer": FORMATS["softsign4"]}
    stq_golden(str(assert_pure(lambda x: quantize(formats, rounding, x), program(sgd()))))


def test_normalized(stq_golden: Golden) -> None:
    formats = adam_formats("midrise2", "adaptive_log3")
    before = program(adam(ADAM_FACTS))
    stq_golden(str(assert_pure(lambda x: quantize(formats, "nearest", x), before)))


def test_a_normalizer_is_decoded_first_and_encoded_first() -> None:
    formats = adam_formats("midrise2", "adaptive_log3")
    unit = only(quantize(formats, "nearest", program(adam(ADAM_FACTS))))
    calls = [n for n in unit.calls if n.target in (DEQUANTIZE, QUANTIZE)]
    assert [n.target for n in calls] == [DEQUANTIZE, DEQUANTIZE, QUANTIZE, DEQUANTIZE, QUANTIZE]
    old_v, old_m, new_v, stored_v, new_m = calls
    assert old_m.args[2] is old_v  # as it was stored
    assert new_m.args[1] is stored_v  # as it will be stored
    assert stored_v.args[0].args[0] is new_v  # type: ignore[union-attr]


@pytest.mark.parametrize("formats", [{}, {"momentum_buffer": FLOAT32}])
def test_float32_states_leave_the_graph_as_it_is(formats: dict[str, Format]) -> None:
    before = sgd()
    after = only(quantize(formats, "stochastic", program(before)))
    assert after.graph is before.graph
    assert after.operands == before.operands
    assert after.formats == {}


def test_operands_of_a_packed_state_keep_its_source_and_say_their_roles() -> None:
    formats = {"momentum_buffer": FORMATS["softsign4"]}
    unit = only(quantize(formats, "stochastic", program(with_sizes(sgd(), (10, 20)))))
    for i, instance in enumerate(unit.instances):
        packed = {o.role: o for o in instance.operands if o.source.key == "momentum_buffer"}
        assert set(packed) == {Role.CODES, Role.SCALES, Role.KEY}
        assert {o.source.param for o in packed.values()} == {i}
        assert packed[Role.CODES].dtype == torch.uint8
    assert unit.formats == {"momentum_buffer_0_codes": FORMATS["softsign4"]}
    assert set(unit.writes or ()) == {
        "param_0",
        "momentum_buffer_0_codes",
        "momentum_buffer_0_scales",
    }


def test_instances_are_grouped_by_their_formats() -> None:
    unit = with_sizes(sgd(), (10, 20, 30, 40))

    def by_size(operand: object, _: StepGraph) -> Format:
        return FORMATS["softsign4" if operand.shape[0] > 20 else "softsign8"]  # type: ignore[attr-defined]

    units = insert_quantize(program(unit), by_size, "nearest").units
    assert [u.name for u in units] == [
        "sgd_momentum_buffer_softsign8",
        "sgd_momentum_buffer_softsign4",
    ]
    assert [[i.param.shape for i in u.instances] for u in units] == [[(10,), (20,)], [(30,), (40,)]]
    assert all(i.operands[2].role is Role.CODES for u in units for i in u.instances)


def test_only_states_are_asked_for_a_format() -> None:
    asked: list[str] = []

    def ask(operand: object, _: StepGraph) -> None:
        asked.append(operand.source.key)  # type: ignore[attr-defined]

    insert_quantize(program(amsgrad()), ask, "nearest")
    assert asked == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]


def test_a_state_that_is_only_read_is_not_written() -> None:
    s = Sketch()
    p, g, a = s.param(), s.grad(), s.state("anchor")
    unit = s.functional({p: s.call(aten.sub.Tensor, p, s.call(aten.mul.Tensor, g, a))})
    after = only(quantize({"anchor": FORMATS["softsign4"]}, "nearest", program(unit)))
    assert after.writes == ("param_0",)
    assert [n.target for n in after.calls].count(QUANTIZE) == 0


def test_a_state_that_is_only_written_is_not_decoded() -> None:
    s = Sketch()
    p, g, old = s.param(), s.grad(), s.state("prev_grad")
    unit = s.functional({old: g, p: s.call(aten.sub.Tensor, p, g)})
    after = only(quantize({"prev_grad": FORMATS["softsign4"]}, "nearest", program(unit)))
    assert [n.target for n in after.calls].count(DEQUANTIZE) == 0
    assert [n.target for n in after.calls].count(QUANTIZE) == 1


def test_a_normalizer_that_the_step_does_not_write() -> None:
    """A frozen second moment: m is read and written in its present units."""
    s = Sketch()
    p, g, m, v = s.param(), s.grad(), s.state("exp_avg"), s.state("exp_avg_sq")
    new_m = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, m, 0.9), g)
    update = s.call(aten.div.Tensor, new_m, s.call(aten.sqrt.default, v))
    unit = s.functional({m: new_m, p: s.call(aten.sub.Tensor, p, update)}, ADAM_FACTS)
    formats = adam_formats("midrise3", "adaptive_log4")
    after = only(quantize(formats, "nearest", program(unit)))
    (read_v, _), (write_m,) = (
        [n for n in after.calls if n.target is target] for target in (DEQUANTIZE, QUANTIZE)
    )
    assert write_m.args[1] is read_v


def test_states_may_share_a_normalizer() -> None:
    s = Sketch()
    p, g = s.param(), s.grad()
    m, slow, v = s.state("m"), s.state("slow"), s.state("v")
    new = {k: s.call(aten.add.Tensor, k, g) for k in (m, slow)}
    new[v] = s.call(aten.add.Tensor, v, s.call(aten.mul.Tensor, g, g))
    total = s.call(aten.add.Tensor, *[new[k] for k in (m, slow)])
    update = s.call(aten.div.Tensor, total, s.call(aten.sqrt.default, new[v]))
    facts = Facts(frozenset({"v"}), {"m": "v", "slow": "v"})
    unit = s.functional(new | {p: s.call(aten.sub.Tensor, p, update)}, facts)
    formats = {"m": FORMATS["midrise2"], "slow": FORMATS["midrise3"], "v": FORMATS["adaptive_log4"]}
    result = quantize(formats, "stochastic", program(unit))
    verify(result, "quantize")
    written = {n.args[1] for n in only(result).calls if n.target is QUANTIZE and n.args[1]}
    assert len(written) == 1


def test_memory_order_is_what_is_encoded() -> None:
    """A transposed state: codes follow its memory, not its rows."""
    unit = sgd()
    for node in unit.placeholders:
        node.meta["example"] = torch.empty(5, 3, device="meta").t()
    formats = {"momentum_buffer": FORMATS["softsign8"]}
    after = only(quantize(formats, "nearest", program(unit)))
    p, g, m = (torch.randn(5, 3).t() for _ in range(3))
    codes, scales = reference.encode(in_memory(m), FORMATS["softsign8"], NEAREST)
    old = reference.decode(codes, scales, FORMATS["softsign8"], 15).view(5, 3).t()
    new = old * 0.9 + g
    got = dict(zip(after.writes or (), after.run(p, g, codes, scales), strict=True))
    expected, _ = reference.encode(in_memory(new), FORMATS["softsign8"], NEAREST)
    assert torch.equal(got["momentum_buffer_0_codes"], expected)
    assert torch.equal(got["param_0"], p - new * 0.01)


def in_memory(x: Tensor) -> Tensor:
    return x.t().flatten()
