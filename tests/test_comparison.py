"""The harness of the examples: variants, runs kept in files, tables, the grid of the evidence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import comparison as comparison_module
import evidence
import stq_compile as stq
from commandline import choose
from comparison import Comparison, Row, Schedule, Settings, compare
from optimizers import KNOWN_OPTIMIZERS, choose_optimizer
from presentation import markdown_table
from runs import Run, StateSize, load_run, run_file, save_run
from tinygpt import GPTConfig, TinyGPT, load_text
from tinyvit import ViTConfig, load_digits
from train_gpt import GPTTask
from train_vit import ViTTask
from variants import AUTO, FP32, Variant, packed, parse_variant

SMALL = GPTConfig(layers=1, width=16, heads=2, context=8)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("fp32", None),
        ("auto", {}),
        ("8", {"precision": 8}),
        ("tolerance=0.1", {"tolerance": 0.1}),
        ("target_bits=3.1, interval=50", {"target_bits": 3.1, "interval": 50}),
        ("exp_avg=4,exp_avg_sq=2", {"precision": {"exp_avg": 4, "exp_avg_sq": 2}}),
        ("rounding=nearest,4", {"rounding": "nearest", "precision": 4}),
        ("*:exp_avg=3,token*:exp_avg=4", {"precision": {"*:exp_avg": 3, "token*:exp_avg": 4}}),
    ],
)
def test_variant_option(text: str, options: object) -> None:
    assert parse_variant(text).options == options


def test_patterns_keep_their_order_and_a_repeated_one_goes_last() -> None:
    options = parse_variant("a=2,*=3,a=4").options
    assert options is not None
    assert list(options["precision"].items()) == [("*", 3), ("a", 4)]


@pytest.mark.parametrize("text", ["", "best", "tolerance=low", "interval=1.5", "exp_avg=4,,"])
def test_wrong_variant_option(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not STATE=WIDTH|is not a number"):
        parse_variant(text)


def test_without_variants_fp32_is_compared_with_pinned_widths() -> None:
    choice, variants = choose("adamw", None, None, None)
    assert variants == [FP32, packed(choice.precision)]
    assert choose("adamw", None, ["8"], None)[1] == [FP32, packed(8)]
    assert choose("adamw", None, None, ["auto"])[1] == [AUTO]
    with pytest.raises(ValueError, match="do not go together"):
        choose("adamw", None, ["8"], ["auto"])


def _identity(**changes: object) -> dict[str, object]:
    identity: dict[str, object] = {
        "task": {"name": "gpt"},
        "optimizer": {"name": "adamw"},
        "variant": {"slug": packed({"a": 4, "b": 2}).slug, "options": {"a": 4, "b": 2}},
        "seed": 3,
    }
    return identity | changes


def _run(label: str, seed: int, loss: float, bits: float = 32.0) -> Run:
    return Run(
        label,
        seed,
        train_losses=[5.5, 5.0],
        valid_losses=[(2, 5.1)],
        step_seconds=[1.0, 0.002],
        bits=[(1, bits + 1), (2, bits)],
        transitions=7,
        results={"loss": loss, "accuracy, %": 90.0},
        size=StateSize(1000, bits, 1 - bits / 32),
    )


def test_runs_are_read_as_they_were_written(tmp_path: Path) -> None:
    identity = _identity()
    file = run_file(tmp_path / "runs", identity)
    assert load_run(file) is None
    save_run(_run("fp32", 3, 1.5), identity, file)
    assert load_run(file) == _run("fp32", 3, 1.5)
    assert [found.name for found in file.parent.iterdir()] == [file.name]
    assert file.name.startswith("gpt-adamw-precision-a-4-b-2-3-")


def test_the_hash_tells_settings_and_the_order_of_patterns_apart(tmp_path: Path) -> None:
    swapped = {"slug": packed({"a": 4, "b": 2}).slug, "options": {"b": 2, "a": 4}}
    identities = [_identity(), _identity(steps=4), _identity(variant=swapped), _identity(seed=4)]
    assert len({run_file(tmp_path, identity) for identity in identities}) == 4


def test_the_table_counts_the_difference_in_deviations_of_fp32() -> None:
    rows = [
        Row(FP32, [_run("fp32", 0, 1.0), _run("fp32", 1, 1.2)]),
        Row(AUTO, [_run("auto", 0, 1.1, 3.0), _run("auto", 1, 1.5, 4.0)]),
    ]
    table = markdown_table(Comparison("GPT", "nats", "AdamW", rows, fused_step_ms=0.5))
    headings, _, fp32, auto, fused = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    assert fp32[headings.index("difference to fp32")] == ""
    cells = dict(zip(headings, auto, strict=True))
    assert cells["difference to fp32"] == "+0.2000 ± 0.1414"
    assert cells["in σ of fp32 seeds"] == "+1.41"
    assert cells["validation accuracy, %"] == "90.00 ± 0.00"
    assert (cells["true bits at the end"], cells["at most"]) == ("3.50", "5.00")
    assert cells["step in ms, median (mean)"] == "501.00 (501.00)"
    assert cells["width changes"] == "7"
    assert "0.50" in fused


def test_one_seed_has_no_deviation_and_no_column_for_it() -> None:
    rows = [Row(v, [_run(v.label, 0, 1.0)]) for v in (FP32, AUTO)]
    assert "in σ" not in markdown_table(Comparison("GPT", "nats", "SGD", rows, None))


@pytest.fixture
def small_task(text_file: Path) -> GPTTask:
    return GPTTask(load_text(text_file), SMALL, batch_size=2)


def _compare(task: GPTTask, schedule: Schedule, variants: list[Variant]) -> Comparison:
    console = Console(quiet=True)
    choice = choose_optimizer("sgd")
    return compare(task, choice, variants, Settings(4, evaluations=2), schedule, console)


def test_every_run_of_a_seed_sees_the_same_data(small_task: GPTTask, tmp_path: Path) -> None:
    variants = [FP32, Variant("packed", {"precision": 4, "min_numel": 64})]
    fp32, small = _compare(small_task, Schedule([0, 1], tmp_path), variants).rows
    assert [run.seed for run in small.runs] == [0, 1]
    for first, second in zip(fp32.runs, small.runs, strict=True):
        assert first.train_losses[0] == second.train_losses[0]
        assert [step for step, _ in second.bits] == [1, 4]
        assert first.bits == [(1, 32.0), (4, 32.0)]
        assert first.library == ""
        assert second.library
        assert second.size is not None
        assert second.size.bits_per_element < 6
        assert second.valid_loss == pytest.approx(first.valid_loss, abs=0.2)
    assert fp32.runs[0].train_losses[0] != fp32.runs[1].train_losses[0]


def test_two_optimizers_train_a_model_and_are_counted_together(
    small_task: GPTTask, tmp_path: Path
) -> None:
    precision = {"momentum_buffer": 8, "exp_avg": 4}
    variants = [FP32, Variant("packed", {"precision": precision, "min_numel": 64})]
    choice, console = choose_optimizer("muon"), Console(quiet=True)
    schedule = Schedule([0], tmp_path)
    result = compare(small_task, choice, variants, Settings(4, evaluations=2), schedule, console)
    fp32, small = (row.runs[0] for row in result.rows)
    assert result.optimizer == "Muon and AdamW"
    assert fp32.size is not None
    assert small.size is not None
    matrices = sum(p.numel() for p in small_task.model().parameters() if p.dim() == 2)
    hidden = sum(p.numel() for p in small_task.model().blocks.parameters() if p.dim() == 2)
    vectors = sum(p.numel() for p in small_task.model().parameters() if p.dim() == 1)
    assert fp32.size.state_bytes == 4 * (hidden + 2 * (matrices - hidden + vectors))
    assert 4 < small.size.bits_per_element < 9
    assert small.valid_loss == pytest.approx(fp32.valid_loss, abs=0.2)


def test_finished_runs_are_not_repeated_on_resume(
    small_task: GPTTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):  # as two processes would
        _compare(small_task, Schedule([seed], tmp_path), [FP32])
    trained: list[int] = []
    monkeypatch.setattr(comparison_module, "_train", lambda *given: trained.append(given[3].seed))
    resumed = _compare(small_task, Schedule([0, 1], tmp_path, resume=True), [FP32])
    assert trained == []
    assert [run.seed for run in resumed.rows[0].runs] == [0, 1]
    other = GPTTask(small_task.text, SMALL, batch_size=3)
    _compare(other, Schedule([0, 1], tmp_path, resume=True), [FP32])
    assert trained == [0, 1]


def test_wrong_options_are_found_before_training(small_task: GPTTask, tmp_path: Path) -> None:
    with pytest.raises(stq.StqError, match="precision=7 is not valid"):
        _compare(small_task, Schedule([0], tmp_path / "runs"), [FP32, packed(7)])
    assert not (tmp_path / "runs").exists()


def test_embeddings_and_head_get_more_bits_than_the_body() -> None:
    (optimizer,) = choose_optimizer("adamw").build(TinyGPT(SMALL))
    assert evidence.EMBEDDINGS_UP.options is not None
    stq.compile(optimizer, min_numel=64, **evidence.EMBEDDINGS_UP.options)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    widths = {(row.param, row.state): row.width for row in stq.report(optimizer).rows}
    for outer in ("token", "position", "head"):
        assert widths[f"{outer}.weight", "exp_avg"] == widths[f"{outer}.weight", "exp_avg_sq"] == 4
    assert widths["blocks.0.qkv.weight", "exp_avg"] == 3
    assert widths["blocks.0.qkv.weight", "exp_avg_sq"] == 2


def test_the_grid_covers_every_tuned_optimizer() -> None:
    assert all(grid.optimizer in KNOWN_OPTIMIZERS for grid in evidence.GRIDS.values())
    assert all(list(grid.variants)[:2] == [FP32, AUTO] for grid in evidence.GRIDS.values())


def test_evidence_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ViTTask(load_digits(), ViTConfig(layers=1, width=16, heads=2), batch_size=4)
    grid = evidence.Grid(lambda: task, "sgd", steps=3)
    monkeypatch.setattr(evidence, "GRIDS", {"small": grid})
    evidence.main(seeds=2, out=tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    assert "### small" in text
    assert text.count("| fp32 |") == 1
    assert evidence.cpu_model() in text
    figures = json.loads((tmp_path / "evidence.json").read_text())
    assert [len(row["runs"]) for row in figures["tables"]["small"]["rows"]] == [2, 2]
    assert len(list((tmp_path / "runs").iterdir())) == 4
