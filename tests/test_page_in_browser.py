"""The page of a run in a real browser: headless Chromium, light and dark, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stq_compile.reporting import run_file
from stq_compile.reporting.page import render
from test_run_report import EVIL, made_up, saved, trained

__all__ = ["saved", "trained"]  # fixtures

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def opened(browser: Any, text: str, folder: Path, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and everything that went wrong or left the machine while it was opened."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on(
        "request",
        lambda request: None if request.url == file.as_uri() else wrong.append(request.url),
    )
    page.goto(file.as_uri())
    return page, wrong


def brightness(page: Any, selector: str) -> float:
    color = page.locator(selector).first.evaluate("e => getComputedStyle(e).backgroundColor")
    return sum(map(float, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_real_run(browser: Any, saved: Path, tmp_path: Path, scheme: str) -> None:
    run = run_file.read(saved)
    page, wrong = opened(browser, render(run), tmp_path, scheme)
    assert (brightness(page, "body") > 128) == (scheme == "light")
    maps = page.locator("svg.map")
    assert maps.count() == 2  # exp_avg and exp_avg_sq
    layers = sum(1 for r in run.rows if r.state == "exp_avg" and r.width < 32)
    changed = {d.step for d in run.decisions if d.changes}
    for i in range(2):
        cells = maps.nth(i).locator(".cell").count()
        assert cells == layers * len(changed | {0})
    assert page.locator("svg.chart").count() == 3
    assert page.locator("svg.graph .node").count() > 30
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 1200
    page.locator("svg.chart").first.hover()
    assert "step" in page.locator("#tip").inner_text()
    page.locator("summary").last.click()
    assert "extern" in page.locator("pre").last.inner_text()
    assert wrong == []


def test_the_reason_of_a_change_can_be_read(browser: Any, tmp_path: Path) -> None:
    run = made_up(reason="bytes are worth more: 0.01 -> 0.02")
    page, wrong = opened(browser, render(run), tmp_path)
    assert page.locator(".cell").count() == 2 * 3
    tip = page.locator("#tip")
    assert tip.is_hidden()
    last = page.locator(".cell[data-lane='0'][data-column='2']")
    last.hover()
    text = tip.inner_text()
    assert "step 50: 5 → 3 bits" in text
    assert "bytes are worth more: 0.01 -> 0.02" in text
    assert "range 1.5" in text
    page.locator(".cell[data-lane='1'][data-column='2']").hover()
    assert "5 bits, steps 50 on" in tip.inner_text()
    assert "bytes are worth more" not in tip.inner_text()
    page.mouse.move(2, 2)
    assert tip.is_hidden()
    page.locator(".cell[tabindex='0']").first.focus()  # as Tab does
    assert "step 20: 4 → 5 bits" in tip.inner_text()
    page.locator("details summary").first.click()
    assert "bytes are worth more" in page.locator("table.list").inner_text()
    assert wrong == []


def test_names_are_text(browser: Any, tmp_path: Path) -> None:
    run = made_up(names=(EVIL, "h.1.w"), reason=EVIL)
    page, wrong = opened(browser, render(run), tmp_path)
    page.locator(".cell[data-lane='0'][data-column='2']").hover()
    assert EVIL in page.locator("#tip").inner_text()
    assert wrong == []
