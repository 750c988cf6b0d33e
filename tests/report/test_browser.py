"""The page in a browser, opened from a file: what a click, a key, a narrow screen and a printer do with it.

Needs Chromium; every test fails on a message in the console, on an error of the page and on a request to anywhere but the page's folder.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report import cases, example

from slmsam2_cli.report import viewer
from slmsam2_cli.report.render import render, volumes_script
from slmsam2_cli.report.schema import Report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
TIMEOUT_MS = 60_000
SOFTWARE_GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
TRUTH = (86, 180, 233)
NO_WEBGL = "HTMLCanvasElement.prototype.getContext = () => null"
Page = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *SOFTWARE_GL])
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One page a kind; in beside.html the volumes of the first case lie beside the page, those of the second are lost."""
    place = tmp_path_factory.mktemp("report")
    whole = example.report()
    write(place / "report.html", whole)
    write(place / "prediction.html", example.report(kind="prediction"))
    names = {"prostate_00": "volumes/first case #1.js", "prostate_01": "volumes/lost.js"}
    cases = tuple(replace(case, volumes=None, volumes_file=names.get(case.id)) for case in whole.cases)
    write(place / "beside.html", replace(whole, cases=cases))
    (place / "volumes").mkdir()
    (place / "volumes" / "first case #1.js").write_text(volumes_script("prostate_00", example.volumes()), encoding="utf-8")
    return place


def write(path: Path, report: Report) -> None:
    path.write_text(render(report), encoding="utf-8")


class LoadedCase:
    """A page with everything it said and asked for."""

    def __init__(self, page: Page, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.said: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def go(self, name: str) -> Page:
        self.page.goto(f"{self.folder.as_uri()}/{name}")
        return self.page

    def check(self) -> None:
        outside = [url for url in self.asked if not url.startswith((f"{self.folder.as_uri()}/", "data:", "blob:"))]
        assert (self.said, outside) == ([], [])


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[LoadedCase]:
    page = browser.new_page(viewport={"width": 1040, "height": 520})
    watched = LoadedCase(page, folder)
    yield watched
    page.close()


ROWS = "[...document.querySelectorAll('#table tbody tr:not([hidden])')].map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"


def column(page: Page, index: int) -> list[str]:
    """The text of one column of the cohort table, rows that are shown only."""
    return [row[index] for row in page.evaluate(ROWS)]


def slice_of(page: Page) -> int:
    return int(page.get_attribute("canvas", "data-slice"))


def wait_for_case(page: Page, case: str) -> None:
    page.wait_for_selector(f".case.open[id='case={case}']")
    assert page.url.endswith(f"#case={case}")


def wait_for_viewer(page: Page, case: str) -> None:
    page.wait_for_selector(f"canvas[data-state=failed], canvas[data-state=ready][data-case='{case}']")
    assert page.get_attribute("canvas", "data-state") == "ready", page.inner_text(".message")


def pixels(page: Page) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator("canvas").screenshot())).convert("RGB")).astype(int)


def near(shown: np.ndarray, colour: tuple[int, int, int], within: int = 40) -> int:
    """Number of pixels of about a colour."""
    return int((np.abs(shown - np.array(colour)).max(axis=-1) < within).sum())


def until(holds: Callable[[], bool]) -> None:
    """Waits for what no selector can say."""
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def keep(page: Page, name: str) -> None:
    """A picture for whoever wants to look: set SLMSAM2_SCREENSHOTS to a folder."""
    if place := os.environ.get("SLMSAM2_SCREENSHOTS"):
        page.screenshot(path=str(Path(place) / f"{name}.png"), full_page=True)


def click_slice(page: Page, share: float) -> None:
    """Clicks the first strip of the open case at a share of its width."""
    box = page.locator(".case.open .strip .plot > svg").first.bounding_box()
    page.locator(".case.open .strip .plot > svg").first.click(position={"x": box["width"] * share, "y": 40})


def test_sorting_puts_numbers_in_order_and_what_is_missing_last(opened: LoadedCase) -> None:
    page = opened.go("report.html")
    page.click("#table th:nth-child(6) button")
    assert page.get_attribute("#table th:nth-child(6)", "aria-sort") == "descending"  # HD95: lower is better, so the worst is first
    shown = column(page, 5)
    known = [float(text) for text in shown if text != "\N{EN DASH}"]
    assert len(known) == 14 and known == sorted(known, reverse=True) and shown[14:] == ["\N{EN DASH}"] * 3
    page.locator("#table th:nth-child(6) button").press("Enter")
    shown = column(page, 5)
    assert [float(text) for text in shown[:14]] == sorted(known) and shown[14:] == ["\N{EN DASH}"] * 3
    page.click("#worst-first")
    assert column(page, 0)[:3] == ["prostate_odd", "prostate_lost", "prostate_lost"]
    opened.check()


def test_rows_are_chosen_by_text_structure_and_group(opened: LoadedCase) -> None:
    page = opened.go("report.html")
    page.fill("#find", "PROSTATE_03")
    assert column(page, 0) == ["prostate_03"] * 2 and page.inner_text("#shown") == "2 of 17 rows"
    page.select_option("#by-structure", "2")
    assert column(page, 1) == ["Transition zone"]
    page.fill("#find", "")
    page.select_option("#by-group", "training")
    assert column(page, 0) == ["prostate_04"]
    opened.check()


def test_measures_without_the_given_slices(opened: LoadedCase) -> None:
    page = opened.go("report.html")
    before = column(page, 4)
    page.select_option("#part", "unprompted")
    after = column(page, 4)
    assert after[0] == "\N{EN DASH}" and float(after[3]) == pytest.approx(float(before[3]) - 0.01, abs=0.0011)
    page.select_option("#part", "all")
    assert column(page, 4) == before
    opened.check()


def test_a_case_opens_by_click_key_and_address(opened: LoadedCase) -> None:
    page = opened.go("report.html")
    assert page.locator(".case:visible").count() == 0
    page.click("#table tbody tr:nth-child(4) td:nth-child(2)")
    wait_for_case(page, "prostate_00")
    assert page.url.endswith("#case=prostate_00")
    page.keyboard.press("j")
    wait_for_case(page, "prostate_01")
    page.keyboard.press("ArrowLeft")
    wait_for_case(page, "prostate_00")
    page.locator("#table tbody tr:nth-child(8) a").press("Enter")
    wait_for_case(page, "prostate_02")
    page.reload()
    assert page.locator(".case:visible h3").all_inner_texts() == ["prostate_02"]
    page.fill("#find", "")
    page.locator("#find").press("j")  # a letter here, not a command
    assert page.input_value("#find") == "j" and page.url.endswith("prostate_02")
    opened.check()


def test_a_slice_is_chosen_by_click_and_by_key(opened: LoadedCase) -> None:
    page = opened.go("report.html#case=prostate_05")
    click_slice(page, 0.5)
    strip = page.locator(".case.open .strip [role=slider]").first
    assert strip.get_attribute("aria-valuenow") == "12"
    assert page.locator(".case.open .strip .readout").first.inner_text().startswith("Slice 12: Dice 1.000")
    strip.press("ArrowRight")
    assert strip.get_attribute("aria-valuenow") == "13" and "Dice" in (strip.get_attribute("aria-valuetext") or "")
    strip.press("End")
    assert "false" in page.locator(".case.open .strip .readout").first.inner_text()
    assert page.url.endswith("prostate_05")  # the arrows chose slices, not cases
    opened.check()


def test_the_viewer_draws_and_follows_the_strip_and_the_strip_follows_it(opened: LoadedCase) -> None:
    page = opened.go("report.html#case=prostate_00")
    page.click(".case.open .start")
    wait_for_viewer(page, "prostate_00")
    middle = pixels(page)
    assert slice_of(page) == 12 and middle.std() > 20 and near(middle, TRUTH) > 50
    click_slice(page, 0.2)  # a fifth of slices 2 to 21
    assert slice_of(page) == 6
    until(lambda: np.abs(pixels(page) - middle).mean() > 1)
    keep(page, "viewer")
    page.uncheck("[data-mask=truth] label:first-of-type input")
    until(lambda: near(pixels(page), TRUTH) < 50)
    page.locator(".controls .wide input").press("ArrowRight")
    assert slice_of(page) == 7
    box = page.locator("canvas").bounding_box()
    page.locator("canvas").click(position={"x": box["width"] * 0.6, "y": box["height"] * 0.3})
    page.wait_for_selector("canvas:not([data-slice='7'])")
    share = 100 * (slice_of(page) - 2 + 0.5) / 20
    assert float(page.locator(".case.open .cursor.chosen").first.get_attribute("x1").rstrip("%")) == pytest.approx(share, abs=0.01)
    page.locator("#next").click()
    wait_for_viewer(page, "prostate_01")
    assert page.locator("canvas").count() == 1
    opened.check()


def test_a_picture_leads_to_its_slice(opened: LoadedCase) -> None:
    page = opened.go("report.html")
    page.locator("#worst a[data-slice='5']").nth(1).click()
    wait_for_viewer(page, "prostate_01")
    assert page.url.endswith("#case=prostate_01") and slice_of(page) == 5
    opened.check()


def test_volumes_beside_the_page_are_found_and_a_lost_file_is_named(opened: LoadedCase) -> None:
    page = opened.go("beside.html#case=prostate_00")
    page.click(".case.open .start")
    wait_for_viewer(page, "prostate_00")
    opened.check()
    page.keyboard.press("j")
    page.wait_for_selector(".message:has-text('volumes/lost.js')")
    assert page.get_attribute("canvas", "data-state") == "failed"


def test_the_numbers_of_slices_survive_cutting_thinning_and_turning(browser: Any, tmp_path: Path) -> None:
    """Volumes along x, stored right to left, that begin at slice 10 and hold every second one."""
    whole = example.report()
    case = replace(whole.cases[0], volumes=example.volumes(axis=0, first=10, step=2))
    write(tmp_path / "cut.html", replace(whole, cases=(case,), worst=()))
    page = browser.new_page()
    opened = LoadedCase(page, tmp_path)
    opened.go("cut.html#case=prostate_00")
    click_slice(page, 0.5)  # slice 12 is slice 1 of the volume
    wait_for_viewer(page, "prostate_00")
    assert slice_of(page) == 12
    assert page.evaluate("[document.querySelector('.wide input').min, document.querySelector('.wide input').max]") == ["10", "96"]
    click_slice(page, 0.01)  # slice 2 is not in it: the nearest is shown
    assert slice_of(page) == 10
    opened.check()
    page.close()


def test_the_viewer_turns_a_sagittal_slice_as_the_pictures_do(browser: Any, tmp_path: Path) -> None:
    """The front on the left: of two masks, the truth lies before the prediction."""
    held = cases.opened(cases.block((8, 24, 24), y=(16, 22)), cases.block((8, 24, 24), y=(2, 8)), axis=2)
    whole = example.report()
    case = replace(whole.cases[0], volumes=viewer.volumes(held))
    write(tmp_path / "sagittal.html", replace(whole, cases=(case,), worst=()))
    page = browser.new_page()
    opened = LoadedCase(page, tmp_path)
    opened.go("sagittal.html#case=prostate_00")
    page.click(".case.open .start")
    wait_for_viewer(page, "prostate_00")
    page.select_option("[data-does=view]", "2")
    until(lambda: near(pixels(page), TRUTH) > 50)
    drawn = pixels(page)
    front = np.argwhere(np.abs(drawn - np.array(TRUTH)).max(axis=-1) < 40)[:, 1]
    assert front.mean() < drawn.shape[1] / 2
    opened.check()
    page.close()


def test_without_webgl_a_sentence_stands_where_the_picture_would(opened: LoadedCase) -> None:
    opened.page.add_init_script(NO_WEBGL)
    page = opened.go("report.html#case=prostate_00")
    page.click(".case.open .start")
    page.wait_for_selector(".message:has-text('WebGL 2')")
    click_slice(page, 0.5)
    assert page.locator(".case.open .strip .readout").first.inner_text().startswith("Slice 12")
    opened.check()


def test_without_scripts_everything_is_there_to_read(browser: Any, folder: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    opened = LoadedCase(page, folder)
    opened.go("report.html")
    assert page.locator(".case:visible").count() == 9 and page.locator("#table tbody tr:visible").count() == 17
    assert page.locator(".scripted:visible").count() == 0
    opened.check()
    page.close()


@pytest.mark.parametrize("name", ["report.html", "prediction.html"])
def test_a_phone_scrolls_down_only(browser: Any, folder: Path, name: str) -> None:
    page = browser.new_page(viewport={"width": 375, "height": 812}, is_mobile=True, has_touch=True)
    opened = LoadedCase(page, folder)
    opened.go(f"{name}#case=prostate_00")
    keep(page, f"phone-{name}")
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [375, 375]
    opened.check()
    page.close()


def test_dark_is_dark(browser: Any, folder: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    opened = LoadedCase(page, folder)
    opened.go("report.html#case=prostate_00")
    keep(page, "dark")
    ground, ink = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (ground, ink) == ("rgb(19, 22, 26)", "rgb(229, 232, 235)")
    opened.check()
    page.close()


def test_on_paper_every_case_is_there_and_what_is_folded_is_open(opened: LoadedCase, tmp_path: Path) -> None:
    page = opened.go("report.html")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".case:visible").count() == 9
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".slot:visible, .filters:visible, nav:visible").count() == 0
    assert page.evaluate("document.querySelector('.tall').scrollHeight <= document.querySelector('.tall').clientHeight + 1")
    page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    opened.check()


def test_keys_alone_reach_the_table_and_focus_is_seen(opened: LoadedCase) -> None:
    page = opened.go("report.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.wait_for_selector("#cohort:focus")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "find"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.check()
