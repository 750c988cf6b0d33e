"""The page in a browser, opened from a file: clicks, keys, narrow screens and printing.

Needs Chromium. Every test fails on a console message, an error of the page, or a request outside the page's folder.
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
REFERENCE = (86, 180, 233)
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
    """Write one page of each kind; beside separate.html lie the volumes of its first case, those of the second are missing."""
    place = tmp_path_factory.mktemp("report")
    whole = example.report()
    write(place / "report.html", whole)
    write(place / "prediction.html", example.report(kind="prediction"))
    names = {"prostate_00": "volumes/first case #1.js", "prostate_01": "volumes/lost.js"}
    cases = tuple(replace(case, volumes=None, volumes_file=names.get(case.id)) for case in whole.cases)
    write(place / "separate.html", replace(whole, cases=cases))
    (place / "volumes").mkdir()
    (place / "volumes" / "first case #1.js").write_text(volumes_script("prostate_00", example.volumes()), encoding="utf-8")
    return place


def write(path: Path, report: Report) -> None:
    path.write_text(render(report), encoding="utf-8")


class WatchedPage:
    """A page with all its console messages and requests."""

    def __init__(self, page: Page, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))

    def go(self, name: str) -> Page:
        self.page.goto(f"{self.folder.as_uri()}/{name}")
        return self.page

    def check(self) -> None:
        outside = [url for url in self.requests if not url.startswith((f"{self.folder.as_uri()}/", "data:", "blob:"))]
        assert (self.messages, outside) == ([], [])


@pytest.fixture
def watched(browser: Any, folder: Path) -> Iterator[WatchedPage]:
    page = browser.new_page(viewport={"width": 1040, "height": 520})
    watched = WatchedPage(page, folder)
    yield watched
    page.close()


ROWS = "[...document.querySelectorAll('#table tbody tr:not([hidden])')].map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"


def column(page: Page, index: int) -> list[str]:
    """Return the text of one column of the case table, visible rows only."""
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
    """Count the pixels of about a colour."""
    return int((np.abs(shown - np.array(colour)).max(axis=-1) < within).sum())


def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition that no selector can express."""
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def keep(page: Page, name: str) -> None:
    """Save a screenshot where SLMSAM2_SCREENSHOTS names a folder."""
    if place := os.environ.get("SLMSAM2_SCREENSHOTS"):
        page.screenshot(path=str(Path(place) / f"{name}.png"), full_page=True)


def click_slice(page: Page, share: float) -> None:
    """Click the first strip of the open case at a fraction of its width."""
    box = page.locator(".case.open .strip .plot > svg").first.bounding_box()
    page.locator(".case.open .strip .plot > svg").first.click(position={"x": box["width"] * share, "y": 40})


def test_sorting_orders_numbers_and_puts_missing_values_last(watched: WatchedPage) -> None:
    page = watched.go("report.html")
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
    watched.check()


def test_rows_are_filtered_by_text_structure_and_group(watched: WatchedPage) -> None:
    page = watched.go("report.html")
    page.fill("#find", "PROSTATE_03")
    assert column(page, 0) == ["prostate_03"] * 2 and page.inner_text("#shown") == "2 of 17 rows"
    page.select_option("#by-structure", "2")
    assert column(page, 1) == ["Transition zone"]
    page.fill("#find", "")
    page.select_option("#by-group", "training")
    assert column(page, 0) == ["prostate_04"]
    watched.check()


def test_measures_of_unprompted_slices_only(watched: WatchedPage) -> None:
    page = watched.go("report.html")
    before = column(page, 4)
    page.select_option("#part", "unprompted")
    after = column(page, 4)
    assert after[0] == "\N{EN DASH}" and float(after[3]) == pytest.approx(float(before[3]) - 0.01, abs=0.0011)
    page.select_option("#part", "all")
    assert column(page, 4) == before
    watched.check()


def test_a_case_opens_by_click_key_and_address(watched: WatchedPage) -> None:
    page = watched.go("report.html")
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
    page.locator("#find").press("j")  # a letter of the search text, not a command
    assert page.input_value("#find") == "j" and page.url.endswith("prostate_02")
    watched.check()


def test_a_slice_is_selected_by_click_and_by_key(watched: WatchedPage) -> None:
    page = watched.go("report.html#case=prostate_05")
    click_slice(page, 0.5)
    strip = page.locator(".case.open .strip [role=slider]").first
    assert strip.get_attribute("aria-valuenow") == "12"
    assert page.locator(".case.open .strip .readout").first.inner_text().startswith("Slice 12: Dice 1.000")
    strip.press("ArrowRight")
    assert strip.get_attribute("aria-valuenow") == "13" and "Dice" in (strip.get_attribute("aria-valuetext") or "")
    strip.press("End")
    assert "false positive" in page.locator(".case.open .strip .readout").first.inner_text()
    assert page.url.endswith("prostate_05")  # the arrows selected slices, not cases
    watched.check()


def test_viewer_and_strip_follow_each_other(watched: WatchedPage) -> None:
    page = watched.go("report.html#case=prostate_00")
    page.click(".case.open .start")
    wait_for_viewer(page, "prostate_00")
    middle = pixels(page)
    assert slice_of(page) == 12 and middle.std() > 20 and near(middle, REFERENCE) > 50
    click_slice(page, 0.2)  # a fifth of slices 2 to 21
    assert slice_of(page) == 6
    until(lambda: np.abs(pixels(page) - middle).mean() > 1)
    keep(page, "viewer")
    page.uncheck("[data-mask=reference] label:first-of-type input")
    until(lambda: near(pixels(page), REFERENCE) < 50)
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
    watched.check()


def test_clicking_a_picture_opens_its_slice(watched: WatchedPage) -> None:
    page = watched.go("report.html")
    page.locator("#worst a[data-slice='5']").nth(1).click()
    wait_for_viewer(page, "prostate_01")
    assert page.url.endswith("#case=prostate_01") and slice_of(page) == 5
    watched.check()


def test_volumes_in_files_are_loaded_and_a_missing_file_is_named(watched: WatchedPage) -> None:
    page = watched.go("separate.html#case=prostate_00")
    page.click(".case.open .start")
    wait_for_viewer(page, "prostate_00")
    watched.check()
    page.keyboard.press("j")
    page.wait_for_selector(".message:has-text('volumes/lost.js is missing')")
    assert page.get_attribute("canvas", "data-state") == "failed"


def test_slice_numbers_are_kept_by_cropping_subsampling_and_reorienting(browser: Any, tmp_path: Path) -> None:
    """Volumes along x, stored right to left, that begin at slice 10 and hold every second one."""
    whole = example.report()
    case = replace(whole.cases[0], volumes=example.volumes(axis=0, first=10, step=2))
    write(tmp_path / "cut.html", replace(whole, cases=(case,), worst=()))
    page = browser.new_page()
    watched = WatchedPage(page, tmp_path)
    watched.go("cut.html#case=prostate_00")
    click_slice(page, 0.5)  # slice 12 is slice 1 of the volume
    wait_for_viewer(page, "prostate_00")
    assert slice_of(page) == 12
    assert page.evaluate("[document.querySelector('.wide input').min, document.querySelector('.wide input').max]") == ["10", "96"]
    click_slice(page, 0.01)  # slice 2 is not in it: the nearest is shown
    assert slice_of(page) == 10
    watched.check()
    page.close()


def test_a_sagittal_slice_has_the_front_on_the_left_as_in_the_pictures(browser: Any, tmp_path: Path) -> None:
    """Of two masks, the reference lies in front of the prediction."""
    held = cases.loaded_case(cases.block((8, 24, 24), y=(16, 22)), cases.block((8, 24, 24), y=(2, 8)), axis=2)
    whole = example.report()
    case = replace(whole.cases[0], volumes=viewer.make_volumes(held))
    write(tmp_path / "sagittal.html", replace(whole, cases=(case,), worst=()))
    page = browser.new_page()
    watched = WatchedPage(page, tmp_path)
    watched.go("sagittal.html#case=prostate_00")
    page.click(".case.open .start")
    wait_for_viewer(page, "prostate_00")
    page.select_option("[data-does=view]", "2")
    until(lambda: near(pixels(page), REFERENCE) > 50)
    drawn = pixels(page)
    front = np.argwhere(np.abs(drawn - np.array(REFERENCE)).max(axis=-1) < 40)[:, 1]
    assert front.mean() < drawn.shape[1] / 2
    watched.check()
    page.close()


def test_without_webgl_a_message_replaces_the_viewer(watched: WatchedPage) -> None:
    watched.page.add_init_script(NO_WEBGL)
    page = watched.go("report.html#case=prostate_00")
    page.click(".case.open .start")
    page.wait_for_selector(".message:has-text('WebGL 2')")
    click_slice(page, 0.5)
    assert page.locator(".case.open .strip .readout").first.inner_text().startswith("Slice 12")
    watched.check()


def test_without_scripts_all_cases_and_rows_are_visible(browser: Any, folder: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    watched = WatchedPage(page, folder)
    watched.go("report.html")
    assert page.locator(".case:visible").count() == 9 and page.locator("#table tbody tr:visible").count() == 17
    assert page.locator(".scripted:visible").count() == 0
    watched.check()
    page.close()


@pytest.mark.parametrize("name", ["report.html", "prediction.html"])
def test_a_phone_needs_no_horizontal_scrolling(browser: Any, folder: Path, name: str) -> None:
    page = browser.new_page(viewport={"width": 375, "height": 812}, is_mobile=True, has_touch=True)
    watched = WatchedPage(page, folder)
    watched.go(f"{name}#case=prostate_00")
    keep(page, f"phone-{name}")
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [375, 375]
    watched.check()
    page.close()


def test_dark_mode_has_a_dark_background(browser: Any, folder: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    watched = WatchedPage(page, folder)
    watched.go("report.html#case=prostate_00")
    keep(page, "dark")
    ground, ink = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (ground, ink) == ("rgb(19, 22, 26)", "rgb(229, 232, 235)")
    watched.check()
    page.close()


def test_printing_shows_every_case_and_opens_folded_sections(watched: WatchedPage, tmp_path: Path) -> None:
    page = watched.go("report.html")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".case:visible").count() == 9
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".slot:visible, .filters:visible, nav:visible").count() == 0
    assert page.evaluate("document.querySelector('.tall').scrollHeight <= document.querySelector('.tall').clientHeight + 1")
    page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    watched.check()


def test_the_table_is_reached_by_keyboard_and_focus_is_visible(watched: WatchedPage) -> None:
    page = watched.go("report.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.wait_for_selector("#cohort:focus")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "find"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    watched.check()
