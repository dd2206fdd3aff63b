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

from netwright.report import write_report


def take(driver: Chrome, out: Path, box: tuple[float, float, float, float]) -> None:
    """A picture of a part of the page: x, y, width, height in CSS pixels."""
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
    answer = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    out.write_bytes(base64.b64decode(answer["data"]))


def section_box(driver: Chrome, selector: str, margin: float = 0) -> tuple[float, float, float, float]:
    """Where an element lies on the page."""
    x, y, width, height = driver.execute_script(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [b.x + scrollX, b.y + scrollY, b.width, b.height]",
        selector,
    )
    return x - margin, y - margin, width + 2 * margin, height + 2 * margin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whole", action="store_true", help="also the whole page: light, dark and narrow")
    given = parser.parse_args()
    report = write_report(given.run)
    given.out.mkdir(parents=True, exist_ok=True)
    with chromium(1240, 1120, scale=1.5) as driver:
        open_report(driver, report)
        take(driver, given.out / "report.png", (0, 0, 1240, 1120))
        hover_point(driver, "chosen")
        take(driver, given.out / "front.png", section_box(driver, "section"))
    if given.whole:
        for name, width, dark in (("light", 1240, False), ("dark", 1240, True), ("narrow", 390, False)):
            with chromium(width, 1000, dark=dark) as driver:
                open_report(driver, report)
                height = driver.execute_script("return document.documentElement.scrollHeight")
                take(driver, given.out / f"{name}.png", (0, 0, width, height))
                for entry in driver.get_log("browser"):
                    print(name, entry["level"], entry["message"])  # noqa: T201
                print(name, driver.execute_script("return document.documentElement.scrollWidth"))


if __name__ == "__main__":
    main()
