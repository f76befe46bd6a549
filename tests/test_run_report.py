"""A run in a file: saved or streamed, read back, shown in the terminal and as a page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import stq_compile as stq
from models import backward, make_model
from schemas import check
from stq_compile.cli import app
from stq_compile.errors import InvalidOptionError, NotCompiledError, RunFileError
from stq_compile.planner.history import Change, Record
from stq_compile.reporting import run_file
from stq_compile.reporting.chart import line_chart
from stq_compile.reporting.page import render
from stq_compile.reporting.picture import HEIGHT, draw
from stq_compile.reporting.recording import LIMIT, Recording
from stq_compile.reporting.run_file import Row, Run
from stq_compile.reporting.timeline import layer_of, layers_of, timeline_of

STEPS = 12
EVIL = "<script>alert('x')</script>&\"{{7*7}}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A short planned run that was streamed; every loss was logged."""
    stream = tmp_path_factory.mktemp("runs") / "stream.jsonl"
    model = make_model()
    optimizer = stq.compile(
        torch.optim.AdamW(model.named_parameters(), lr=0.01),
        min_numel=64,
        interval=4,
        hysteresis=0.0,
        record=str(stream),
    )
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        stq.log(optimizer, 2.0 - step / 10)
    return optimizer, stream


@pytest.fixture(scope="module")
def saved(trained: tuple[Any, Path]) -> Path:
    optimizer, stream = trained
    path = stream.with_name("saved.jsonl")
    stq.report(optimizer).save(path)
    return path


def row(param: str, state: str = "m", width: int = 4, elements: int = 128) -> Row:
    return Row(param, state, (elements,), "softsign4", width, elements // 2, 4 * elements)


def change(param: str, before: int | None, after: int, reason: str = "why") -> Change:
    return Change(param, "m", before, after, 0.01, reason, ((after, 0.01, 64),), {"range": 1.5})


def record(step: int, *changes: Change) -> Record:
    return Record(step, "tolerance", 0.1, 4.0, 0.0, "not calibrated", changes)


def made_up(names: tuple[str, ...] = ("h.0.w", "h.1.w"), reason: str = "why") -> Run:
    """Two decisions: all states from 4 bits to 5 at step 20, the first one to 3 at 50."""
    return Run(
        optimizer="Made<Up>",
        options={"precision": {"m": 4}},
        versions={"torch": "2"},
        steps=60,
        rows=tuple(row(n, width=3 if n == names[0] else 5) for n in names),
        decisions=(
            record(0, *(change(n, None, 4) for n in names)),
            record(20, *(change(n, 4, 5) for n in names)),
            record(50, change(names[0], 5, 3, reason)),
        ),
        losses=((10, 4.0), (20, math.nan), (60, 3.0)),
    )


# Files. ---------------------------------------------------------------------------------------


def test_a_saved_run_holds_what_the_report_and_the_history_say(
    trained: tuple[Any, Path], saved: Path
) -> None:
    optimizer, _ = trained
    run = run_file.read(saved)
    report = stq.report(optimizer)
    assert run.rows == report.rows
    assert run.decisions == stq.history(optimizer).records
    assert len(run.decisions) > 2
    assert [step for step, _ in run.losses] == list(range(1, STEPS + 1))
    assert run.losses[-1][1] == pytest.approx(2.0 - (STEPS - 1) / 10)
    assert run.steps == STEPS
    assert run.options["min_numel"] == 64
    assert sum(t.tensors for t in run.templates) == 6
    assert sum(k.tensors for k in run.kernels) == 6
    assert all("extern" in k.source for k in run.kernels)


def test_a_streamed_run_ends_where_the_saved_one_does(
    trained: tuple[Any, Path], saved: Path
) -> None:
    streamed, whole = run_file.read(trained[1]), run_file.read(saved)
    for name in ("optimizer", "decisions", "losses", "templates", "rows", "steps"):
        assert getattr(streamed, name) == getattr(whole, name), name
    assert {k.name for k in whole.kernels} <= {k.name for k in streamed.kernels}


def test_a_run_that_was_killed_is_readable(saved: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl"
    cut.write_text(saved.read_text()[:-20])
    assert run_file.read(cut).losses == run_file.read(saved).losses[:-1]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = made_up()
    run_file.save(run, tmp_path / "run.jsonl")
    found = run_file.read(tmp_path / "run.jsonl")
    assert math.isnan(found.losses[1][1])
    finite = tuple(point for point in found.losses if not math.isnan(point[1]))
    assert replace(found, losses=finite) == replace(run, losses=(run.losses[0], run.losses[2]))
    assert [f.name for f in tmp_path.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "empty"),
        ("{", 1, "no JSON"),
        ('{"kind": "loss", "step": 1, "loss": 2.0}\n', 1, "no 'run' event"),
        ('{"kind": "run", "version": 9}\n', 1, "version 9; this release reads 1"),
        ('{"kind": "run"}\n', 1, "KeyError"),
        ("HEAD\n[1]\n", 2, "not as expected"),
        ('HEAD\n{"kind": "dance"}\n', 2, "unknown kind 'dance'"),
        ('HEAD\n{"kind": "decision", "step": 3}\n', 2, "not as expected"),
        ("HEAD\n{\nHEAD\n", 2, "no JSON"),
    ],
)
def test_what_is_no_run_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(text.replace("HEAD", json.dumps(run_file.head_event(made_up()))))
    with pytest.raises(RunFileError, match=rf"run\.jsonl, line {line}: .*{reason}"):
        run_file.read(file)


def test_a_record_that_cannot_be_written_is_an_option_error(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(make_model().parameters())
    with pytest.raises(InvalidOptionError, match=r"record=.*cannot be written"):
        stq.compile(optimizer, record=tmp_path / "no" / "folder.jsonl")
    stq.compile(optimizer)  # it was left as it was


def test_a_loss_of_what_is_not_compiled_is_refused() -> None:
    with pytest.raises(NotCompiledError):
        stq.log(torch.optim.AdamW(make_model().parameters()), 1.0)


def test_the_loss_of_a_closure_is_noted_by_itself() -> None:
    model = make_model()
    optimizer = stq.compile(torch.optim.SGD(model.parameters(), lr=0.1), precision=32)

    def closure() -> torch.Tensor:
        backward(model, 0)
        return torch.tensor(1.25)

    optimizer.step(closure)
    assert stq.report(optimizer).run.losses == ((1, 1.25),)


def test_losses_in_memory_are_bounded() -> None:
    recording = Recording(None)
    for step in range(3 * LIMIT):
        recording.loss(step, float(step))
    assert len(recording.losses) <= LIMIT
    steps = [step for step, _ in recording.losses]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 3 * LIMIT - 1)


# Widths over time. ----------------------------------------------------------------------------


def test_widths_over_time() -> None:
    timeline = timeline_of(made_up())
    assert timeline.steps == (0, 20, 50)
    first, second = timeline.lanes
    assert [cell.width for cell in first.cells] == [4, 5, 3]
    assert [cell.width for cell in second.cells] == [4, 5, 5]
    assert [t.change.reason for t in first.cells[2].transitions] == ["why"]
    assert second.cells[2].transitions == ()


def test_columns_that_are_merged_lose_no_change() -> None:
    decisions = [record(0, change("w", None, 4))]
    decisions += [record(s, change("w", 4 + s % 2, 4 + (s + 1) % 2)) for s in range(1, 200)]
    run = replace(made_up(("w",)), decisions=tuple(decisions))
    timeline = timeline_of(run, columns=10)
    (lane,) = timeline.lanes
    assert len(timeline.steps) == 10
    assert sum(len(cell.transitions) for cell in lane.cells) == 200
    assert lane.cells[-1].width == decisions[-1].changes[0].after


def test_a_history_whose_beginning_is_gone_starts_from_the_first_width_known() -> None:
    run = made_up()
    timeline = timeline_of(replace(run, decisions=run.decisions[1:]))
    assert [cell.width for cell in timeline.lanes[0].cells] == [4, 5, 3]


def test_pinned_states_have_one_column() -> None:
    timeline = timeline_of(replace(made_up(), decisions=()))
    assert timeline.steps == (0,)
    assert [lane.cells[0].width for lane in timeline.lanes] == [3, 5]


@pytest.mark.parametrize(
    ("param", "layer"),
    [
        ("h.3.attn.c_attn.weight", "h.3"),
        ("transformer.h.11.ln.bias", "transformer.h.11"),
        ("wte.weight", "wte"),
        ("weight", "weight"),
        ("0.weight", "0"),
        ("group0.param12", "group0"),
    ],
)
def test_layers_of_names(param: str, layer: str) -> None:
    assert layer_of(param) == layer


def test_layers_average_by_elements() -> None:
    run = replace(
        made_up(), decisions=(), rows=(row("h.0.a", width=2, elements=300), row("h.0.b", width=6))
    )
    (layer,) = layers_of(timeline_of(run).lanes)
    assert layer.bits == ((300 * 2 + 128 * 6) / 428,)


# Pictures. ------------------------------------------------------------------------------------


def test_boxes_of_a_drawing_do_not_overlap_and_edges_go_down(saved: Path) -> None:
    run = run_file.read(saved)
    for graph in (*(t.graph for t in run.templates), *(k.graph for k in run.kernels)):
        picture = draw(graph)
        assert len(picture.boxes) == len(graph["nodes"])
        assert len(picture.paths) == len({tuple(e) for e in graph["edges"]})
        for a, b in graph["edges"]:
            assert picture.boxes[a].y + HEIGHT < picture.boxes[b].y
        for i, a in enumerate(picture.boxes):
            assert a.width / 2 <= a.x <= picture.width - a.width / 2
            for b in picture.boxes[i + 1 :]:
                if a.layer == b.layer:
                    assert abs(a.x - b.x) >= (a.width + b.width) / 2


def test_an_empty_drawing() -> None:
    assert draw({"nodes": [], "edges": []}).boxes == ()


def test_charts_hold_all_points_within_their_frame() -> None:
    chart = line_chart("loss", "", [(s, math.sin(s)) for s in range(5000)], end=5000)
    assert chart is not None
    assert len(chart.points) <= 601
    for x, y, _, _ in chart.points:
        assert chart.left <= x <= chart.right
        assert chart.top <= y <= chart.bottom
    assert [t.label for t in chart.y_ticks] == ["-1", "-0.5", "0", "0.5", "1"]
    assert line_chart("loss", "", [(0, math.nan)], end=1) is None
    stairs = line_chart("bits", "", [(0, 4.0), (10, 5.0)], end=30, steps=True)
    assert stairs is not None
    assert [(s, v) for _, _, s, v in stairs.points] == [(0, 4), (10, 4), (10, 5), (30, 5)]


# Shown. ---------------------------------------------------------------------------------------


def report(*args: str, columns: int = 80) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *args], env={"COLUMNS": str(columns)})
    return result.exit_code, result.stdout


def test_the_terminal_shows_widths_by_layer_and_step(tmp_path: Path) -> None:
    run_file.save(made_up(), tmp_path / "run.jsonl")
    code, text = report(str(tmp_path / "run.jsonl"))
    assert code == 0
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "20", "50"] in lines
    assert ["h.0", "4", "5", "3"] in lines
    assert ["h.1", "4", "5", "5"] in lines
    assert "loss 4 at step 10, 3 at step 60" in text
    assert "3 changes of width" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_json_of_a_real_run_keeps_to_its_schema(saved: Path) -> None:
    code, text = report(str(saved), "--json")
    assert code == 0
    found = json.loads(text)
    check("report", found)
    assert {e["kind"] for e in found["events"]} == {
        "run", "template", "kernel", "states", "decision", "loss", "comparison",
    }  # fmt: skip


def test_the_page_needs_nothing_and_escapes_everything(tmp_path: Path) -> None:
    run = made_up(names=(EVIL, "h.1.w"), reason=EVIL)
    page = render(replace(run, optimizer=EVIL, options={EVIL: EVIL}, versions={EVIL: EVIL}))
    assert "<script>alert" not in page
    assert "alert('x')" not in page.replace("&#39;", "")
    assert "49" not in page.split("<main>")[0].split("</style>")[1]
    assert "http:" not in page
    assert "https:" not in page
    assert page.count("<script") == 2  # the data and the page's own


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    run_file.save(made_up(), tmp_path / "run.jsonl")
    result = CliRunner().invoke(
        app, ["report", str(tmp_path / "run.jsonl"), "--html", str(tmp_path / "no/page.html")]
    )
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
