"""What the demo stands on: its text, its model, its options; and the whole of it, briefly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import matrix_formats
import stq_compile as stq
from comparison import Settings
from optimizers import choose_optimizer
from tinygpt import GPTConfig, TinyGPT, load_text
from tinyvit import BLACK, Digits, TinyViT, ViTConfig, load_digits
from train_fsdp2 import BACKENDS, own_device
from train_vit import ViTTask
from variants import parse_precision

SMALL = GPTConfig(layers=1, width=16, heads=2, context=8)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


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
    (optimizer,) = choose_optimizer(name, lr=0.5).build(model)
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


def test_patterns_of_parameter_names_match() -> None:
    model = TinyGPT(SMALL)
    (optimizer,) = choose_optimizer("sgd").build(model)
    stq.compile(optimizer, min_numel=64, precision={"momentum_buffer": 3, "token*:*": 8})
    model.loss(torch.randint(256, (2, 9))).backward()
    optimizer.step()
    widths = {row.param: row.width for row in stq.report(optimizer).rows}
    assert widths["token.weight"] == 8
    assert widths["head.weight"] == 3


@pytest.mark.parametrize(
    ("name", "package"), [("lion", "lion_pytorch"), ("soap", "pytorch_optimizer")]
)
def test_a_missing_package_is_named_with_its_extra(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    shown = package.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{shown}, which is not installed.*\[evidence\]"):
        choose_optimizer(name)


def test_missing_digits_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"scikit-learn, which is not installed.*\[demo\]"):
        load_digits()


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


def test_sharded_training_takes_gpus_and_nccl_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for available, device, backend in ((True, "cuda:3", "nccl"), (False, "cpu", "gloo")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert own_device() == torch.device(device)
        assert BACKENDS[own_device().type] == backend
    assert set(chosen) == {torch.device("cuda:3")}


def test_a_choice_with_two_parts_divides_the_parameters() -> None:
    model = TinyGPT(SMALL)
    choice = choose_optimizer("muon", lr=0.5)
    muon, adamw = choice.build(model)
    names = [set(group["param_names"]) for o in (muon, adamw) for group in o.param_groups]
    hidden, outer, vectors = names
    assert hidden == {f"blocks.0.{n}.weight" for n in ("qkv", "attention_out", "mlp_in", "mlp_out")}
    assert outer == {"token.weight", "position.weight", "head.weight"}
    assert set.union(*names) == {name for name, _ in model.named_parameters()}
    assert {g["lr"] for o in (muon, adamw) for g in o.param_groups} == {0.5}
    assert vectors == set.union(*names) - hidden - outer


def test_each_part_gets_the_widths_of_its_states() -> None:
    choice = choose_optimizer("muon")
    precision = {"momentum_buffer": 4, "token*:exp_avg": 5, "*": 8}
    first, second = choice.options_of_parts({"precision": precision, "min_numel": 64})
    assert first == {"precision": {"momentum_buffer": 4, "*": 8}, "min_numel": 64}
    assert second == {"precision": {"token*:exp_avg": 5, "*": 8}, "min_numel": 64}
    assert list(second["precision"]) == ["token*:exp_avg", "*"]
    unknown = choice.options_of_parts({"precision": {"max_exp": 4}})  # which compile refuses
    assert unknown == [{"precision": {"max_exp": 4}}] * 2
    assert choice.options_of_parts({"precision": 4}) == [{"precision": 4}] * 2


def test_matrix_formats_keep_what_entries_lose() -> None:
    digits = load_digits()
    losses = {
        name: matrix_formats.train(matrix_formats.VARIANTS[name], digits, steps=40, seed=0)
        for name in ("fp32", "factors, 4 bits", "entries, 4 bits")
    }
    fp32, factors, entries = losses.values()
    assert 4 < entries.bits < factors.bits < 5
    assert factors.loss == pytest.approx(fp32.loss, abs=0.1)
    assert entries.loss > fp32.loss + 0.2
    table = matrix_formats.results_table({name: [run] for name, run in losses.items()})
    assert table.row_count == 3


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
