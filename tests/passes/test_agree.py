"""Facts of a state that several graphs use: one answer for all of them."""

from __future__ import annotations

from graphs import Sketch, aten
from stq_compile.passes.agree import State, agree
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.ranges import find_ranges
from stq_compile.step_graph import Facts, Program, StepGraph
from zoo import adam, averages, descend


def proven(*units: StepGraph) -> Program:
    return find_normalizers(find_ranges(Program("Test", units)))


def frozen_v() -> StepGraph:
    """Adam between two updates of its second moment: ``exp_avg_sq`` is read and not written."""
    s = Sketch("frozen_v")
    p, g, m, v = s.param(), s.grad(), s.state("exp_avg"), s.state("exp_avg_sq")
    new_m, _ = averages(s, g, m, v)
    root = s.call(aten.add.Tensor, s.call(aten.sqrt.default, v), 1e-8)
    return s.functional({m: new_m, p: descend(s, p, s.call(aten.div.Tensor, new_m, root))})


def signed_v() -> StepGraph:
    """A graph that writes ``exp_avg_sq`` without any proof of its sign."""
    s = Sketch("signed_v")
    p, g, v = s.param(), s.grad(), s.state("exp_avg_sq")
    return s.functional({v: s.call(aten.sub.Tensor, v, g), p: descend(s, p, v)})


def facts(programs: list[Program]) -> list[Facts]:
    return [unit.facts for program in programs for unit in program.units]


def unknown(state: State) -> bool:
    raise AssertionError(f"{state} is written by a graph: its values prove nothing")


ADAM = Facts(frozenset({"exp_avg_sq"}), {"exp_avg": "exp_avg_sq"})


def test_a_graph_that_only_reads_a_state_takes_what_the_writer_proves() -> None:
    writer, reader = proven(adam()), proven(frozen_v())
    assert reader.units[0].facts == Facts()
    found = facts(agree([writer, reader], unknown))
    assert found[0] == writer.units[0].facts
    assert found[0].nonnegative == found[1].nonnegative == ADAM.nonnegative
    assert found[0].normalizers == found[1].normalizers == ADAM.normalizers


def test_one_writer_without_a_proof_takes_it_from_all() -> None:
    found = facts(agree([proven(adam()), proven(frozen_v()), proven(signed_v())], unknown))
    for one in found:
        assert not one.nonnegative
        assert not one.normalizers


def test_the_values_count_where_no_graph_writes() -> None:
    for positive in (True, False):
        asked: list[State] = []

        def is_nonnegative(
            state: State, asked: list[State] = asked, positive: bool = positive
        ) -> bool:
            asked.append(state)
            return positive

        (found,) = facts(agree([proven(frozen_v())], is_nonnegative))
        assert found.nonnegative == (ADAM.nonnegative if positive else frozenset())
        assert [key for _, key in asked] == ["exp_avg_sq"]


def test_programs_that_agree_are_left_alone() -> None:
    programs = [proven(adam()), proven(adam())]
    assert all(a is b for a, b in zip(agree(programs, unknown), programs, strict=True))


def test_what_is_fragile_in_one_graph_is_so_in_all() -> None:
    fragile = adam().replace(facts=Facts(fragile={"exp_avg": "why"}, copies=frozenset({"exp_avg"})))
    found = facts(agree([proven(adam()), Program("Test", (fragile,))], unknown))
    assert [one.fragile for one in found] == [{"exp_avg": "why"}] * 2
    assert [one.copies for one in found] == [frozenset({"exp_avg"})] * 2
