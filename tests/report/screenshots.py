"""Takes the two pictures of the report that the documentation shows.

    python tests/report/screenshots.py RUN_DIR OUT_DIR

writes OUT_DIR/report.png (the page's head) and OUT_DIR/front.png (the front, with a point hovered).
RUN_DIR/report.html is written anew first.
"""

import argparse
import base64
from pathlib import Path

from chromium import chromium, hover_point, open_report
from selenium.webdriver import Chrome

from netwright.report import read_run, write_report


def take(driver: Chrome, out: Path, box: tuple[float, float, float, float]) -> None:
    """A picture of a part of the page: x, y, width, height in CSS pixels; it must lie within the window."""
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
    answer = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": False})
    out.write_bytes(base64.b64decode(answer["data"]))


def section_box(driver: Chrome, selector: str) -> tuple[float, float, float, float]:
    """Where an element lies on the page."""
    x, y, width, height = driver.execute_script(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [b.x + scrollX, b.y + scrollY, b.width, b.height]",
        selector,
    )
    return x, y, width, height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whole", action="store_true", help="also the whole page: light, dark and narrow")
    given = parser.parse_args()
    report = write_report(given.run)
    given.out.mkdir(parents=True, exist_ok=True)
    with chromium(1200, 1700, scale=1.5) as driver:
        open_report(driver, report)
        take(driver, given.out / "report.png", (0, 0, 1200, 1080))
        hover_point(driver, "chosen" if read_run(given.run).state().get("chosen") else "baseline")
        take(driver, given.out / "front.png", section_box(driver, "section"))
    if given.whole:
        for name, width, dark in (("light", 1200, False), ("dark", 1200, True), ("narrow", 390, False)):
            with chromium(width, 9000, dark=dark) as driver:
                open_report(driver, report)
                height = driver.execute_script("return document.body.getBoundingClientRect().height")
                take(driver, given.out / f"{name}.png", (0, 0, width, height))


if __name__ == "__main__":
    main()
