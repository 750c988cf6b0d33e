"""Size and time of a report, and a test of its page in headless Chromium with screenshots.

    python benchmarks/report.py DATASET [-w WORKSPACE] [-o docs/images] [--name report]

Run slmsam2 finetune and slmsam2 predict first (inside the data set, so that predictions are in the workspace). Prints the size of the page
and the seconds of `slmsam2 evaluate` with and without it (median of three, alternating). Fails if the page writes to the console, requests
anything outside its folder, or does not respond to a click as expected. Needs Chromium and playwright.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def evaluate(dataset: Path, workspace: Path, out: Path, *more: str) -> float:
    """Run the whole command, including the start of Python. Return seconds."""
    command = [sys.executable, "-c", "from slmsam2_cli.cli.app import main; main()", "evaluate", "-d", str(dataset), "-w", str(workspace)]
    started = time.perf_counter()
    done = subprocess.run([*command, "-o", str(out), "--quiet", *more], capture_output=True, text=True, check=False)
    if done.returncode == 2:
        sys.exit(done.stderr)
    return time.perf_counter() - started


def screenshot(page: Page, path: Path) -> None:
    """Save a screenshot with 256 colours, at a third of the bytes."""
    page.screenshot(path=str(path))
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def walk(page: Page, pictures: Path, name: str) -> list[str]:
    """Sort by Dice, open the worst case, choose a slice and check the viewer. Return what was done."""
    rows = page.locator("#table tbody tr:not([hidden])")
    screenshot(page, pictures / f"{name}.png")
    page.locator("#table th button", has_text="Dice").click()
    dice = [float(text) for text in rows.locator("td:nth-child(4)").all_inner_texts() if text[0].isdigit()]
    assert dice == sorted(dice), "the worst Dice is not first"
    rows.first.locator("td").nth(1).click()
    case = page.locator(".case.open")
    case.wait_for()
    strip = case.locator(".strip .plot > svg").first
    box = strip.bounding_box()
    assert box is not None
    strip.click(position={"x": box["width"] * 0.4, "y": 40})
    canvas = page.locator("canvas[data-state=ready]")
    canvas.wait_for()
    chosen = case.locator(".strip [role=slider]").first.get_attribute("aria-valuenow")
    assert canvas.get_attribute("data-slice") == chosen, "the viewer shows another slice than the strip"
    case.scroll_into_view_if_needed()
    path = pictures / f"{name}-case.png"
    screenshot(page, path)
    drawn = np.asarray(Image.open(path).convert("RGB"))
    seen = canvas.screenshot(path=str(pictures / f".{name}-canvas.png"))
    (pictures / f".{name}-canvas.png").unlink()
    assert len(seen) > 5000 and drawn.std() > 10, "nothing was drawn"
    return [f"{len(dice)} rows sorted by Dice", f"case {case.locator('h3').inner_text()} opened", f"slice {chosen} in the viewer"]


def check_page(report: Path, pictures: Path, name: str) -> list[str]:
    """Open the page from its file and use it. Return what was done. Fails on console messages and outside requests."""
    messages: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        chromium = next((found for n in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(n))), None)
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(120_000)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        seen = walk(page, pictures, name)
        browser.close()
    outside = [url for url in requests if not url.startswith((report.parent.as_uri(), "data:", "blob:"))]
    assert (messages, outside) == ([], []), (messages, outside)
    return [*seen, "no console message, no outside request"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-w", "--workspace", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="folder for screenshots")
    parser.add_argument("--name", default="report")
    options = parser.parse_args()
    space = options.workspace or options.dataset / "slmsam2"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "evaluation"
        took: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(3):
            took["without"].append(evaluate(options.dataset, space, out, "--no-report"))
            took["with"].append(evaluate(options.dataset, space, out))
        files = sum(path.stat().st_size for path in (out / "report_files").glob("*"))
        size = (out / "report.html").stat().st_size
        bare, whole = (statistics.median(seconds) for seconds in (took["without"], took["with"]))
        print("| page | files next to it | evaluate without report | with |\n|---|---|---|---|")
        print(f"| {size / 2**20:.2f} MiB | {files / 2**20:.2f} MiB | {bare:.1f} s | {whole:.1f} s |\n")
        pictures = options.output or Path(folder)
        pictures.mkdir(parents=True, exist_ok=True)
        for line in check_page(out / "report.html", pictures, options.name):
            print(line)


if __name__ == "__main__":
    main()
