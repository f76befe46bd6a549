"""What the demo stands on: its text, its model, its options; and the whole of it, briefly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

import comparison as comparison_module
import evidence
import stq_compile as stq
from commandline import choose
from comparison import Comparison, Schedule, Settings, compare
from optimizers import KNOWN_OPTIMIZERS, choose_optimizer
from presentation import markdown_table
from runs import Run, StateSize, load_run, run_file, save_run
from tinygpt import CHUNK, HELD_OUT, GPTConfig, TinyGPT, load_text
from tinyvit import BLACK, Digits, TinyViT, ViTConfig, load_digits
from train_gpt import GPTTask
from train_vit import ViTTask
from variants import AUTO, FP32, Variant, packed, parse_precision, parse_variant

SMALL = GPTConfig(layers=1, width=16, heads=2, context=8)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and wait for it where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Chunks that are each filled with a byte of their own."""
    file = tmp_path / "text.txt"
    file.write_bytes(b"".join(bytes([chunk]) * CHUNK for chunk in range(3 * HELD_OUT)))
    return file


def test_pythons_own_text_is_long_and_english() -> None:
    text = load_text()
    assert len(text.train) + len(text.valid) > 1_000_000
    assert bytes(text.train).count(b" the ") > 10_000


def test_validation_text_is_not_trained_on(text_file: Path) -> None:
    text = load_text(text_file)
    assert text.valid.unique().tolist() == [9, 19, 29]
    assert not set(text.train.unique().tolist()) & {9, 19, 29}


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with pytest.raises(ValueError, match=r"short\.txt: 9 bytes of text"):
        load_text(file)


def test_batches_depend_on_the_generator_alone(text_file: Path) -> None:
    text = load_text(text_file)
    first, second = (text.batch(torch.Generator().manual_seed(1), 4, 16) for _ in range(2))
    assert first.shape == (4, 17)
    assert torch.equal(first, second)


def test_the_model_starts_at_chance() -> None:
    torch.manual_seed(0)
    model = TinyGPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) > 1_000_000
    loss = model.loss(torch.randint(256, (4, 65)))
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.6)


def test_the_model_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = TinyGPT(SMALL)
    tokens = torch.randint(256, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(tokens)[:, 5:], model(changed)[:, 5:])


@pytest.mark.parametrize(
    ("values", "precision"),
    [
        ([], None),
        (["4"], 4),
        (["exp_avg=4,exp_avg_sq=3"], {"exp_avg": 4, "exp_avg_sq": 3}),
        (["exp_avg=4", "0.*:exp_avg_sq=3"], {"exp_avg": 4, "0.*:exp_avg_sq": 3}),
    ],
)
def test_precision_option(values: list[str], precision: object) -> None:
    assert parse_precision(values) == precision


@pytest.mark.parametrize("value", ["", "four", "exp_avg=", "=4", "4,3", "exp_avg=4,"])
def test_wrong_precision_option(value: str) -> None:
    with pytest.raises(ValueError, match="is not STATE=WIDTH"):
        parse_precision([value])


@pytest.mark.parametrize("name", ["adamw", "Adam", "SGD", "rmsprop", "adagrad", "RAdam", "Lion"])
def test_optimizers_decay_matrices_only(name: str) -> None:
    model = TinyGPT(SMALL)
    optimizer = choose_optimizer(name, lr=0.5).build(model)
    matrices, vectors = optimizer.param_groups
    assert all(p.dim() == 2 for p in matrices["params"])
    assert all(p.dim() == 1 for p in vectors["params"])
    assert vectors["weight_decay"] == 0
    assert matrices["lr"] == 0.5


@pytest.mark.parametrize("name", ["lionel", "lbfgs", "optimizer", ""])
def test_unknown_optimizer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="there are adadelta"):
        choose_optimizer(name)


def test_learning_rate_warms_up_and_decays() -> None:
    settings = Settings(steps=100)
    factors = [settings.lr_factor(step) for step in range(100)]
    assert max(factors) == 1.0
    assert factors.index(1.0) == 9
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(settings.final_lr, abs=0.01)


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


def test_patterns_of_parameter_names_match() -> None:
    model = TinyGPT(SMALL)
    optimizer = choose_optimizer("sgd").build(model)
    stq.compile(optimizer, min_numel=64, precision={"momentum_buffer": 3, "token*:*": 8})
    model.loss(torch.randint(256, (2, 9))).backward()
    optimizer.step()
    widths = {row.param: row.width for row in stq.report(optimizer).rows}
    assert widths["token.weight"] == 8
    assert widths["head.weight"] == 3


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ValueError, match=r"lion-pytorch, which is not installed.*\[evidence\]"):
        choose_optimizer("lion")


def test_missing_digits_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"scikit-learn, which is not installed.*\[demo\]"):
        load_digits()


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
        comparison_module.Row(FP32, [_run("fp32", 0, 1.0), _run("fp32", 1, 1.2)]),
        comparison_module.Row(AUTO, [_run("auto", 0, 1.1, 3.0), _run("auto", 1, 1.5, 4.0)]),
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
    rows = [comparison_module.Row(v, [_run(v.label, 0, 1.0)]) for v in (FP32, AUTO)]
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


def test_digits_are_split_and_normalized() -> None:
    digits = load_digits()
    assert len(digits.train_images) + len(digits.valid_images) == 1797
    assert digits.train_images.mean().item() == pytest.approx(0, abs=0.01)
    assert digits.train_images.std().item() == pytest.approx(1, abs=0.01)
    assert digits.valid_labels.unique().tolist() == list(range(10))


def test_training_digits_move_by_up_to_a_pixel() -> None:
    image = torch.full((1, 8, 8), BLACK)
    image[0, 3, 4] = 1.0
    digits = Digits(image, torch.tensor([7]), image, torch.tensor([7]))
    images, labels = digits.batch(torch.Generator().manual_seed(0), 200)
    spots = {tuple(spot) for spot in (images == 1).nonzero()[:, 1:].tolist()}
    assert spots == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}
    assert labels.tolist() == [7] * 200


def test_the_vit_sees_where_each_patch_lies() -> None:
    torch.manual_seed(0)
    model = TinyViT(ViTConfig())
    assert sum(p.numel() for p in model.parameters()) > 500_000
    model.eval()
    images = torch.randn(2, 8, 8)
    assert model(images).shape == (2, 10)
    assert not torch.allclose(model(images), model(images.roll(2, dims=1)), atol=1e-3)


def test_vit_measures_accuracy_and_goes_on_training() -> None:
    task = ViTTask(load_digits(), ViTConfig(layers=1, width=16, heads=2), batch_size=4)
    model = task.model()
    results = task.evaluate(model, quick=True)
    assert list(results) == ["loss", "accuracy, %"]
    assert 0 <= results["accuracy, %"] <= 60
    assert model.training


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


@pytest.mark.slow
def test_the_demo_runs_and_saves_its_results(tmp_path: Path) -> None:
    arguments = ["--steps", "12", "--batch", "2", "--seeds", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_gpt.py", *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "train_gpt.png" in done.stdout
    assert (tmp_path / "train_gpt.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "train_gpt.json").read_text())
    first, second = (row["runs"] for row in results["rows"])
    assert [run["seed"] for run in second] == [0, 1]
    for fp32, small in zip(first, second, strict=True):
        assert fp32["train_losses"][0] == small["train_losses"][0]
        assert fp32["size"]["bits_per_element"] == 32
        assert small["size"]["bits_per_element"] < 5
        assert small["results"]["loss"] == pytest.approx(fp32["results"]["loss"], abs=0.6)
